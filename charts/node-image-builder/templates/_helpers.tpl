{{/* Name of the release's objects. */}}
{{- define "nib.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "nib.artifacts" -}}
{{ include "nib.fullname" . }}-artifacts
{{- end -}}

{{/* Labels that select pods; (list . component). */}}
{{- define "nib.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "nib.labels" -}}
{{ include "nib.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end -}}

{{/* An image reference; (list . "operator"). */}}
{{- define "nib.image" -}}
{{- $root := index . 0 -}}
{{- $which := index . 1 -}}
{{- $image := index $root.Values.image $which -}}
{{- $repository := required (printf "set image.%s.repository to where you pushed the %s image; images/README.md says how it is built" $which $which) $image.repository -}}
{{- if $image.digest -}}
{{ $repository }}@{{ $image.digest }}
{{- else -}}
{{ $repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "nib.signingKeySecret" -}}
{{ .Values.artifactServer.signingKey.existingSecret | default (printf "%s-signing-key" (include "nib.fullname" .)) }}
{{- end -}}

{{/* Where build pods upload. */}}
{{- define "nib.uploadURL" -}}
http://{{ include "nib.artifacts" . }}.{{ .Release.Namespace }}.svc{{ if ne (int .Values.artifactServer.service.port) 80 }}:{{ .Values.artifactServer.service.port }}{{ end }}
{{- end -}}

{{/* Pod settings that pass the Pod Security level "restricted". */}}
{{- define "nib.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "nib.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Rule: which images the clusters name, so that none of them is removed. */}}
{{- define "nib.readClusters" }}  # Which images EKS Anywhere's clusters name, before an older image is removed.
  - apiGroups: [anywhere.eks.amazonaws.com]
    resources: [tinkerbelldatacenterconfigs, tinkerbellmachineconfigs, vspheremachineconfigs, nutanixmachineconfigs]
    verbs: [list]
{{- end -}}
