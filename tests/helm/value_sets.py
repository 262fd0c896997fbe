"""The releases that the tests render: each turns one part of the defaults on, off or round."""

from __future__ import annotations

from typing import Any

MONITORING = {
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "kube-prometheus"}, "keySecret": {"name": "scrape"}},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    }
}
AUTOSCALED = {"gateway": {"autoscaling": {"enabled": True}}}
OPEN_NETWORK = {"networkPolicy": {"enabled": False}}
CLOSED_NETWORK = {
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}],
        "databaseTo": [{"ipBlock": {"cidr": "10.1.2.0/24"}}],
        "allowHttpsOut": False,
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 8443}]}],
    }
}
NO_GPU = {"engine": {"gpus": 0}, "retrain": {"gpus": 0}}
BIG_ENGINE = {
    "engine": {"replicas": 3, "gpus": 4, "runtimeClassName": "nvidia", "nodeSelector": {"pool": "h200"}},
    "config": {"engine": {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "extra_args": ["--seed=1"]}},
}
OUTSIDE_ENGINE = {
    "engine": {"enabled": False},
    "config": {"serving": {"models": {"assistant": {"engines": ["https://vllm.example.org"]}}}},
}
SERVING_ONLY = {"retrain": {"enabled": False}, "migration": {"enabled": False}, "serviceAccount": {"create": False}}
EXISTING_STORAGE = {
    "adapters": {"existingClaim": "shared-adapters"},
    "models": {"existingClaim": "shared-models"},
    "retrain": {"state": {"existingClaim": "runs"}},
    "gateway": {"spool": {"storageClassName": "fast"}},
    "config": {"engine": {"model": "/models/llama"}},
}
INGRESS = {
    "gateway": {"ingress": {"enabled": True, "host": "llm.example.org", "tlsSecret": "tls", "className": "nginx"}}
}
EXTRAS = {
    name: {
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
        "podAnnotations": {"team": "llm"},
    }
    for name in ("gateway", "engine", "worker", "retrain")
} | {"imagePullSecrets": [{"name": "registry"}]}
SCORED = {
    "config": {
        "worker": {"metrics_port": 9200},
        "serving": {"guards": {"toxicity": "refuse", "scorer_url": "http://pawl-worker:9200"}},
    }
}
MANY_WORKERS = {"config": {"serving": {"workers": 3, "spool": {"max_bytes": 3 * 1024**3}}}}
KEYLESS = {"config": {"auth": {"required": False}}}
FIXED_SPLIT = {
    "config": {
        "serving": {
            "max_body_bytes": 16777216,
            "models": {
                "assistant": {
                    "experiment": {
                        "key": "tone",
                        "variants": [
                            {"name": "control", "model": "base-model", "weight": 0.9},
                            {"name": "treatment", "model": "base-model--r0001-1a2b3c4d", "weight": 0.1},
                        ],
                    }
                }
            },
        }
    }
}

VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "monitoring": MONITORING,
    "autoscaled": AUTOSCALED,
    "open_network": OPEN_NETWORK,
    "closed_network": CLOSED_NETWORK,
    "no_gpu": NO_GPU,
    "big_engine": BIG_ENGINE,
    "outside_engine": OUTSIDE_ENGINE,
    "serving_only": SERVING_ONLY,
    "existing_storage": EXISTING_STORAGE,
    "ingress": INGRESS,
    "extras": EXTRAS,
    "scored": SCORED,
    "many_workers": MANY_WORKERS,
    "keyless": KEYLESS,
    "fixed_split": FIXED_SPLIT,
}
