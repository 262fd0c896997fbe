"""Choices of the chart that keep records, streams and GPUs safe."""

from __future__ import annotations

import pytest
import yaml

from pawl.errors import NotNow, Unreachable
from pawl.settings import Settings
from retrain.errors import ProcessLost, TrainingInterrupted
from serving.supervisor import DRAIN_STOP_S, STOP_MARGIN_S
from tests.helm.chart import CHART, Manifest, Values, container, named, of_kind, pods, render
from tests.helm.value_sets import AUTOSCALED, BIG_ENGINE, EXISTING_STORAGE, EXTRAS, INGRESS, NO_GPU, VALUE_SETS

every_value_set = pytest.mark.parametrize("name", VALUE_SETS)


def pre_stop_seconds(pod: Manifest) -> int:
    command = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    return int(command[1])


def volume(pod: Manifest, name: str) -> Manifest:
    (found,) = [item for item in pod["volumes"] if item["name"] == name]
    result: Manifest = found
    return result


def mount(pod: Manifest, name: str) -> Manifest:
    (found,) = [item for item in container(pod)["volumeMounts"] if item["name"] == name]
    result: Manifest = found
    return result


@every_value_set
def test_pods_are_locked_down(name: str) -> None:
    for component, pod in pods(render(VALUE_SETS[name])).items():
        assert pod["securityContext"]["runAsNonRoot"] is True, component
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        security = container(pod)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert mount(pod, "tmp")["mountPath"] == "/tmp"


@every_value_set
def test_no_service_links(name: str) -> None:
    """A Service called pawl-gateway would inject PAWL_GATEWAY_PORT, a setting that Pawl refuses to start with."""
    for component, pod in pods(render(VALUE_SETS[name])).items():
        assert pod["enableServiceLinks"] is False, component


@every_value_set
def test_every_mount_has_a_volume_and_every_volume_a_mount(name: str) -> None:
    objects = render(VALUE_SETS[name])
    for component, pod in pods(objects).items():
        volumes = {item["name"] for item in pod["volumes"]} | ({"spool"} if component == "gateway" else set())
        assert {item["name"] for item in container(pod)["volumeMounts"]} == volumes, component


@every_value_set
def test_claims_of_the_release_are_created_or_existing(name: str) -> None:
    objects = render(VALUE_SETS[name])
    created = {item["metadata"]["name"] for item in of_kind(objects, "PersistentVolumeClaim")}
    used = {
        item["persistentVolumeClaim"]["claimName"]
        for pod in pods(objects).values()
        for item in pod["volumes"]
        if "persistentVolumeClaim" in item
    }
    assert created <= used
    assert used - created == ({"shared-adapters", "shared-models", "runs"} if name == "existing_storage" else set())


@pytest.mark.parametrize(("drain", "pre_stop"), [(60, 5), (300, 10), (0.5, 0), (12.5, 3)])
def test_gateway_outlives_its_drain(drain: float, pre_stop: int) -> None:
    values = {"gateway": {"preStopSeconds": pre_stop}, "config": {"serving": {"drain_grace_s": drain}}}
    pod = pods(render(values))["gateway"]
    assert pre_stop_seconds(pod) == pre_stop
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + drain + STOP_MARGIN_S + DRAIN_STOP_S


@pytest.mark.parametrize(("shutdown", "pre_stop"), [(60, 15), (0, 15), (600, 30)])
def test_engine_outlives_its_drain(shutdown: int, pre_stop: int) -> None:
    values = {"engine": {"preStopSeconds": pre_stop}, "config": {"engine": {"shutdown_timeout_s": shutdown}}}
    pod = pods(render(values))["engine"]
    assert f"--shutdown-timeout={shutdown}" in container(pod)["args"]
    assert pod["terminationGracePeriodSeconds"] > pre_stop_seconds(pod) + shutdown


def test_every_probe_and_service_names_a_port_of_its_container() -> None:
    objects = render()
    for component, pod in pods(objects).items():
        only = container(pod)
        probes = [only[key] for key in ("startupProbe", "livenessProbe", "readinessProbe") if key in only]
        wanted = {probe["httpGet"]["port"] for probe in probes}
        assert wanted <= {item["name"] for item in only.get("ports", [])}, component
    for service in of_kind(objects, "Service"):
        target = container(pods(objects)[service["metadata"]["labels"]["app.kubernetes.io/component"]])
        assert service["spec"]["ports"][0]["targetPort"] in {item["name"] for item in target["ports"]}


def test_worker_is_alive_while_it_answers_scrapes() -> None:
    worker = container(pods(render())["worker"])
    assert worker["ports"] == [{"name": "metrics", "containerPort": 9101}]
    assert worker["livenessProbe"]["httpGet"] == {"path": "/metrics", "port": "metrics"}


def test_gateway_probes_never_ask_the_database_or_the_engine() -> None:
    gateway = container(pods(render())["gateway"])
    assert gateway["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert gateway["startupProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert gateway["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "http"}


def test_engine_may_take_half_an_hour_to_start_but_dies_within_two_minutes() -> None:
    engine = container(pods(render())["engine"])
    startup, liveness = engine["startupProbe"], engine["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert liveness["periodSeconds"] * liveness["failureThreshold"] <= 120
    assert {probe["httpGet"]["path"] for probe in (startup, liveness, engine["readinessProbe"])} == {"/health"}


def test_spool_outlives_its_pod() -> None:
    gateway = named(render(), "StatefulSet", "pawl-gateway")["spec"]
    (claim,) = gateway["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "spool"
    assert mount(gateway["template"]["spec"], "spool")["mountPath"] == "/var/lib/pawl"
    assert gateway["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_fixed_replicas_without_an_autoscaler() -> None:
    objects = render({"gateway": {"replicas": 4}})
    assert named(objects, "StatefulSet", "pawl-gateway")["spec"]["replicas"] == 4
    assert of_kind(objects, "HorizontalPodAutoscaler") == []


def test_autoscaler_and_replicas_never_fight() -> None:
    objects = render(AUTOSCALED)
    assert "replicas" not in named(objects, "StatefulSet", "pawl-gateway")["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler", "pawl-gateway")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "pawl-gateway"}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)


def test_disruptions_take_one_pod_at_a_time() -> None:
    objects = render()
    for name in ("pawl-gateway", "pawl-engine"):
        budget = named(objects, "PodDisruptionBudget", name)["spec"]
        workload = named(objects, "StatefulSet", name)["spec"]
        assert budget["maxUnavailable"] == 1
        assert budget["selector"] == workload["selector"]
        spread = workload["template"]["spec"]["topologySpreadConstraints"]
        assert {item["topologyKey"] for item in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}


def test_engine_serves_adapters_from_the_shared_volume_read_only() -> None:
    pod = pods(render())["engine"]
    engine = container(pod)
    flags = {"--enable-lora", "--max-lora-rank=32", "--max-loras=4", "--max-cpu-loras=32"}
    assert flags <= set(engine["args"])
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"} in engine["env"]
    assert mount(pod, "adapters") == {"name": "adapters", "mountPath": "/adapters", "readOnly": True}
    assert volume(pod, "shm")["emptyDir"]["medium"] == "Memory"
    assert engine["image"] == "vllm/vllm-openai:v0.33.0"


def test_engine_and_retraining_share_one_claim_for_adapters() -> None:
    objects = render()
    claims = {
        volume(pods(objects)[component], "adapters")["persistentVolumeClaim"]["claimName"]
        for component in ("engine", "worker", "retrain")
    }
    assert claims == {"pawl-adapters"}
    claim = named(objects, "PersistentVolumeClaim", "pawl-adapters")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "readOnly" not in mount(pods(objects)["retrain"], "adapters")


def test_engine_service_gives_each_pod_a_name() -> None:
    objects = render()
    service = named(objects, "Service", "pawl-engine")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is False
    assert named(objects, "StatefulSet", "pawl-engine")["spec"]["serviceName"] == "pawl-engine"


@pytest.mark.parametrize("component", ["engine", "retrain"])
def test_gpu_work_asks_for_gpus(component: str) -> None:
    pod = pods(render())[component]
    assert container(pod)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


@pytest.mark.parametrize("component", ["engine", "retrain"])
def test_without_gpus_none_is_asked_for(component: str) -> None:
    assert set(container(pods(render(NO_GPU))[component])["resources"]["limits"]) == {"memory"}


def test_only_engine_and_retraining_hold_gpus() -> None:
    for component in ("gateway", "worker", "migration"):
        assert "nvidia.com/gpu" not in container(pods(render())[component])["resources"]["limits"]


def test_a_big_engine() -> None:
    pod = pods(render(BIG_ENGINE))["engine"]
    engine = container(pod)
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert {"--tensor-parallel-size=4", "--max-model-len=32768", "--gpu-memory-utilization=0.9"} <= set(engine["args"])
    assert engine["args"][-1] == "--seed=1"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"] == {"pool": "h200"}


def test_retraining_never_overlaps_and_resumes() -> None:
    cron = named(render(), "CronJob", "pawl-retrain")["spec"]
    job = cron["jobTemplate"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["schedule"] == "17 3 * * 0"
    assert container(job["template"]["spec"])["args"] == ["retrain", "run", "--if-due"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 4
    assert job["activeDeadlineSeconds"] == 172800
    assert volume(job["template"]["spec"], "state")["persistentVolumeClaim"]["claimName"] == "pawl-retrain"


def test_retraining_is_retried_only_when_that_can_help() -> None:
    cron = named(render(), "CronJob", "pawl-retrain")["spec"]
    ignore, fail = cron["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["values"] == [1, 2]
    assert not {one.exit_code for one in (Unreachable, NotNow, ProcessLost, TrainingInterrupted)} & {1, 2}


def test_weekly_rounds_are_due_even_when_the_last_one_started_late() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["config"]["retrain"]["interval_hours"] < Settings().retrain.interval_hours == 7 * 24


def test_migration_runs_before_the_release_with_its_own_configuration() -> None:
    objects = render()
    hooks = [item for item in objects if "helm.sh/hook" in item["metadata"].get("annotations", {})]
    assert [(item["kind"], item["metadata"]["name"]) for item in hooks] == [
        ("ConfigMap", "pawl-migration"),
        ("Job", "pawl-migration"),
    ]
    for item in hooks:
        assert item["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert "before-hook-creation" in item["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    weights = [int(item["metadata"]["annotations"]["helm.sh/hook-weight"]) for item in hooks]
    assert weights[0] < weights[1]
    pod = pods(objects)["migration"]
    assert container(pod)["args"] == ["db", "upgrade"]
    assert volume(pod, "config")["configMap"]["name"] == "pawl-migration"
    assert "serviceAccountName" not in pod  # The release's account does not exist yet on the first install.


@every_value_set
def test_secrets_come_by_reference(name: str) -> None:
    for component, pod in pods(render(VALUE_SETS[name])).items():
        variables = {item["name"]: item for item in container(pod).get("env", [])}
        if component != "engine":
            reference = variables["PAWL_DATABASE__PASSWORD"]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "pawl-database", "key": "password"}
            reference = variables["PAWL_AUTH__SECRET"]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "pawl-auth", "key": "secret"}
        assert "HF_TOKEN" not in variables


def test_secret_names_and_keys_can_be_chosen_or_left_out() -> None:
    values: Values = {"secrets": {"database": {"name": ""}, "hubToken": {"name": "hub", "key": "read"}}}
    all_pods = pods(render(values))
    gateway = {item["name"] for item in container(all_pods["gateway"])["env"]}
    engine = {item["name"]: item for item in container(all_pods["engine"])["env"]}
    assert "PAWL_DATABASE__PASSWORD" not in gateway
    assert engine["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "read"}


def test_models_from_a_volume() -> None:
    all_pods = pods(render(EXISTING_STORAGE))
    for component in ("engine", "retrain"):
        assert mount(all_pods[component], "models") == {"name": "models", "mountPath": "/models", "readOnly": True}
    assert container(all_pods["engine"])["command"] == ["vllm", "serve", "/models/llama"]


def test_extras_reach_their_component() -> None:
    objects = render(EXTRAS)
    for component in ("gateway", "engine", "worker", "retrain"):
        pod = pods(objects)[component]
        assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in container(pod)["env"]
        assert mount(pod, "ca")["mountPath"] == "/etc/ca"
    assert all(pod["imagePullSecrets"] == [{"name": "registry"}] for pod in pods(objects).values())


def test_ingress_exposes_the_public_routes_only() -> None:
    ingress = named(render(INGRESS), "Ingress", "pawl-gateway")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["path"] == "/v1"
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
