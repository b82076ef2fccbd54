"""What the `ray.io/v1` RayJob of KubeRay 1.4 takes beside pods, as JSON Schema; unknown fields are errors.

Written from the fields of KubeRay's API reference: the definition that it ships is a megabyte, nearly all of it pods,
which Kubernetes' own schemas check (`test_kubernetes.py`). Of what this project does not write only the names are here.
"""

from __future__ import annotations

from typing import Any

INTEGER = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRING, NUMBER, BOOLEAN, ANY = {"type": "string"}, {"type": "number"}, {"type": "boolean"}, dict[str, str]()
STRINGS = {"type": "object", "additionalProperties": STRING}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}


def strict(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


GROUP = {"rayStartParams": STRINGS, "template": POD_TEMPLATE}
HEAD = strict(("rayStartParams", "template"), **GROUP, headService=ANY, enableIngress=BOOLEAN, serviceType=STRING)
WORKERS = strict(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    **GROUP,
    groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    numOfHosts=INTEGER,
    idleTimeoutSeconds=INTEGER,
    suspend=BOOLEAN,
    scaleStrategy=ANY,
)
CLUSTER = strict(
    ("headGroupSpec",),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    rayVersion=STRING,
    suspend=BOOLEAN,
    managedBy=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=ANY,
    headServiceAnnotations=STRINGS,
    gcsFaultToleranceOptions=ANY,
)
SPEC = strict(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=STRING,
    rayClusterSpec=CLUSTER,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    activeDeadlineSeconds={**INTEGER, "minimum": 1},
    backoffLimit=INTEGER,
    submitterPodTemplate=POD_TEMPLATE,
    submitterConfig=ANY,
    metadata=STRINGS,
    clusterSelector=STRINGS,
    managedBy=STRING,
    deletionStrategy=ANY,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    entrypointResources=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    suspend=BOOLEAN,
)
LABEL = {"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"}
METADATA = strict(
    ("name",),
    name={"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    labels={
        "type": "object",
        "propertyNames": {"pattern": "^([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"},
        "additionalProperties": LABEL,
    },
)
"""The operator refuses names of other forms once the object is there, and Kubernetes such labels."""
RAY_JOB = strict(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=SPEC,
)
