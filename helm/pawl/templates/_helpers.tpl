{{- define "pawl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change in a release's life, so selectors may use them. Call with (dict "root" $ "component" "x"). */}}
{{- define "pawl.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* On pods: nothing that a new chart version would change, or every upgrade would reload the engines. */}}
{{- define "pawl.podLabels" -}}
{{ include "pawl.selectorLabels" . }}
app.kubernetes.io/part-of: pawl
{{- end -}}

{{- define "pawl.labels" -}}
{{ include "pawl.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "pawl.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pawl.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "pawl.image" -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}

{{- define "pawl.adaptersClaim" -}}
{{- default (printf "%s-adapters" (include "pawl.fullname" .)) .Values.adapters.existingClaim -}}
{{- end -}}

{{- define "pawl.retrainClaim" -}}
{{- default (printf "%s-retrain" (include "pawl.fullname" .)) .Values.retrain.state.existingClaim -}}
{{- end -}}

{{/* Every engine pod by its own name: adapters are loaded pod by pod, so a balanced address would not do. */}}
{{- define "pawl.engineUrls" -}}
{{- $service := printf "%s-engine" (include "pawl.fullname" .) -}}
{{- $root := . -}}
{{- range $i := until (int .Values.engine.replicas) }}
- http://{{ $service }}-{{ $i }}.{{ $service }}.{{ $root.Release.Namespace }}.svc:{{ int $root.Values.config.engine.port }}
{{- end -}}
{{- end -}}

{{/* pawl.yaml: the values under `config`, with the engines' addresses where they were left out. */}}
{{- define "pawl.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range $name, $model := $config.serving.models -}}
{{- if not $model.engines -}}
{{- if not $.Values.engine.enabled -}}
{{- fail (printf "engine.enabled is false: set config.serving.models.%s.engines" $name) -}}
{{- end -}}
{{- $_ := set $model "engines" (include "pawl.engineUrls" $ | fromYamlArray) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Not empty where gateways ask the worker to score texts: the toxicity guard. */}}
{{- define "pawl.asksScorer" -}}
{{- dig "guards" "scorer_url" "" .Values.config.serving | default "" -}}
{{- end -}}

{{/* A quantity such as 10Gi, in bytes. */}}
{{- define "pawl.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (regexFind "[A-Za-z]*$" . | get $units | float64) | int64 -}}
{{- end -}}

{{/* Refuses spools that may grow past their volume: a full disk stops the gateway, a full spool only its callers. */}}
{{- define "pawl.checkSpool" -}}
{{- $serving := .Values.config.serving -}}
{{- $wanted := mul (int64 $serving.workers) (int64 $serving.spool.max_bytes) -}}
{{- if gt $wanted (include "pawl.bytes" .Values.gateway.spool.size | int64) -}}
{{- fail (printf "config.serving.workers (%d) times config.serving.spool.max_bytes (%d) is more than gateway.spool.size (%s): lower max_bytes or enlarge the volume" (int64 $serving.workers) (int64 $serving.spool.max_bytes) .Values.gateway.spool.size) -}}
{{- end -}}
{{- end -}}

{{- define "pawl.secretEnv" -}}
{{- if .secret.name }}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret.name }}
      key: {{ .secret.key }}
{{- end }}
{{- end -}}

{{/* What every process of Pawl reads. */}}
{{- define "pawl.env" -}}
- name: PAWL_CONFIG
  value: /etc/pawl/pawl.yaml
{{- include "pawl.secretEnv" (dict "variable" "PAWL_DATABASE__PASSWORD" "secret" .Values.secrets.database) }}
{{- include "pawl.secretEnv" (dict "variable" "PAWL_AUTH__SECRET" "secret" .Values.secrets.auth) }}
{{- end -}}

{{/* One training process per GPU; on several nodes, which of them this is and where the first one is. */}}
{{- define "pawl.trainingNodesEnv" -}}
{{- $nodes := int .Values.retrain.nodes -}}
{{- if or (gt $nodes 1) (gt (int .Values.retrain.gpus) 1) }}
- name: PAWL_RETRAIN__DISTRIBUTED__PROCESSES
  value: {{ max 1 (int .Values.retrain.gpus) | quote }}
{{- end }}
{{- if gt $nodes 1 }}
- name: PAWL_RETRAIN__DISTRIBUTED__NODES
  value: {{ $nodes | quote }}
- name: PAWL_RETRAIN__DISTRIBUTED__NODE_RANK
  valueFrom:
    fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
- name: RETRAIN_JOB
  valueFrom:
    fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}
- name: PAWL_RETRAIN__DISTRIBUTED__LEADER
  value: $(RETRAIN_JOB)-0.{{ include "pawl.fullname" . }}-retrain
{{- end }}
{{- end -}}

{{/* Caches of model programs, on a volume because the root file system is read-only. */}}
{{- define "pawl.cacheEnv" -}}
- {name: HOME, value: {{ .path }}}
- {name: USER, value: pawl}
- {name: XDG_CACHE_HOME, value: {{ .path }}}
- {name: HF_HOME, value: {{ .path }}/huggingface}
- {name: TORCH_HOME, value: {{ .path }}/torch}
- {name: TRITON_CACHE_DIR, value: {{ .path }}/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: {{ .path }}/inductor}
- {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
{{- include "pawl.secretEnv" (dict "variable" "HF_TOKEN" "secret" .root.Values.secrets.hubToken) }}
{{- end -}}

{{/* The part of a pod's spec that all components share. Call with (dict "root" $ "pod" .Values.<component>). */}}
{{- define "pawl.podSpec" -}}
serviceAccountName: {{ include "pawl.serviceAccountName" .root }}
automountServiceAccountToken: false
# Service links would inject PAWL_* variables, and Pawl refuses settings that it does not know.
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Requests and limits with the GPUs of this component added. */}}
{{- define "pawl.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if int .gpus -}}
{{- $limits := default dict $resources.limits -}}
{{- $_ := set $limits .gpuResource (int .gpus) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "pawl.spread" -}}
{{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "pawl.selectorLabels" $ | nindent 6 }}
{{- end }}
{{- end -}}
