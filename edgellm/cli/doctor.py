"""``edgellm doctor``: what this machine has, which kernels were chosen for it, and whether they compute right."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import click

from edgellm.cli.progress import ProgressBar
from edgellm.machine.terminal import echo, fields, human_bytes, json_text, table


@click.command("doctor")
@click.option("--no-selftest", is_flag=True, help="Do not run the kernels.")
@click.option("--software-gpus", is_flag=True, help="Run the shaders on GPUs that only pretend to be one, too.")
@click.option("--no-bandwidth", is_flag=True, help="Do not measure how fast memory is read.")
@click.option("--clear-cache", is_flag=True, help="Delete the compiled kernels and do nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.pass_context
def command(
    ctx: click.Context, no_selftest: bool, software_gpus: bool, no_bandwidth: bool, clear_cache: bool, as_json: bool
) -> None:
    """Examine this machine and test every kernel on it.

    Shows the CPU and the GPUs, the kernels chosen for them, the architectures of models that run, memory and versions.
    Every kernel is compared with a plain numpy computation on this CPU, every shader on each GPU. Exit status 1 when
    one of them is wrong.

    \b
    Examples:
      edgellm doctor
      edgellm doctor --json > machine.json
    """
    from edgellm.measure import doctor

    if clear_cache:
        echo(f"{doctor.clear_kernel_cache()} compiled kernels deleted", err=True)
        return
    facts: dict[str, Any] = {"machine": doctor.machine_facts(), "versions": doctor.package_versions()}
    facts["models"] = doctor.model_facts()
    facts["kernels"] = doctor.kernel_facts()
    facts["gpus"] = doctor.gpu_facts()
    with ProgressBar() as progress:
        if not no_bandwidth:
            progress.note("measuring how fast this machine reads memory")
            facts["read_bandwidth"] = {str(n): round(rate) for n, rate in doctor.bandwidths().items()}
            progress.finish()
        if not no_selftest:
            tested = [gpu for gpu in facts["gpus"] if not gpu["missing"] and (software_gpus or not gpu["software"])]
            facts["self_test"] = _run_self_test(progress, [int(gpu["device"].partition(":")[2]) for gpu in tested])
    facts["kernel_cache"] = {
        k: v if v is None or isinstance(v, int) else str(v) for k, v in vars(doctor.kernel_cache_state()).items()
    }
    wrong = [result for result in facts.get("self_test", ()) if not result["ok"]]
    facts["ok"] = not wrong
    echo(json_text(facts) if as_json else _as_text(facts))
    ctx.exit(1 if wrong else 0)


def _run_self_test(progress: ProgressBar, gpus: list[int]) -> list[dict[str, Any]]:
    from edgellm.measure import doctor

    results: list[dict[str, Any]] = []
    progress.update("selftest", 0, None)
    for result in itertools.chain(doctor.self_test(), *map(doctor.gpu_self_test, gpus)):
        results.append(dataclasses.asdict(result))
        progress.update("selftest", len(results), None, result.kernel)
    return results


def _as_text(facts: dict[str, Any]) -> str:
    machine, kernels, cache = facts["machine"], facts["kernels"], facts["kernel_cache"]
    setting = f"; EDGELLM_CPU_FORM={kernels['form_setting']}" if kernels["form_setting"] else ""
    known = "tried in an emulator only; " if kernels["form_emulated"] else ""
    rows: list[tuple[str, object]] = [
        ("system", machine["system"]),
        ("python", machine["python"]),
        ("cpu", f"{machine['cpu']}, {machine['cores']} cores for us"),
        ("features", " ".join(kernels["features"]) or "unknown"),
        ("executors", ", ".join(kernels["executors"])),
        ("kernels", f"{kernels['form']} ({known}this CPU runs {', '.join(kernels['forms'])}{setting})"),
        ("fast types", ", ".join(kernels["fast_types"])),
        ("architectures", ", ".join(facts["models"]["architectures"])),
        ("other types", f"{len(kernels['dequantized_types'])} more run through dequantization"),
        *((gpu["device"], _gpu(gpu)) for gpu in facts["gpus"]),
        ("memory", f"{human_bytes(machine['memory_available'])} free of {human_bytes(machine['memory_total'])}"),
        ("large pages", machine["large_pages"]),
    ]
    for n, rate in facts.get("read_bandwidth", {}).items():
        rows.append((f"bandwidth, {n} thread{'s' if n != '1' else ''}", f"{rate / 1e9:.1f} GB/s"))
    ready = f"{cache['n_ready']} kernels ready, {cache['n_stale']} of other versions, {human_bytes(cache['nbytes'])}"
    rows += [
        (
            "kernel cache",
            f"{cache['folder']}: {ready}" if cache["trouble"] is None else f"NOT KEPT: {cache['trouble']}",
        ),
        ("models", machine["folders"]["models"]),
        ("chats", machine["folders"]["sessions"]),
        ("settings", machine["folders"]["config"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())),
    ]
    text = fields(rows)
    if "self_test" in facts:
        text += "\n\n" + _self_test_table(facts["self_test"])
    return text


def _gpu(gpu: dict[str, Any]) -> str:
    memory = f", {human_bytes(gpu['memory_total'])}{'' if gpu['memory_is_own'] else ' of the system'}"
    memory += f", {human_bytes(gpu['memory_available'])} free"
    software = "; computes on the CPU, never chosen by auto" if gpu["software"] else ""
    missing = f"; NOT USABLE, it lacks {', '.join(gpu['missing'])}" if gpu["missing"] else ""
    return f"{gpu['name']} by {gpu['interface']}{memory}{software}{missing}"


def _self_test_table(results: list[dict[str, Any]]) -> str:
    lines = [
        (r["kernel"], r["form"], f"{r['nmse']:.1e}", f"{r['limit']:.0e}", "ok" if r["ok"] else "WRONG", r["detail"])
        for r in results
    ]
    n_wrong = sum(not result["ok"] for result in results)
    verdict = (
        f"{n_wrong} of {len(results)} kernels compute wrong on this machine" if n_wrong else "all kernels compute right"
    )
    return table(("KERNEL", "FORM", "NMSE", "LIMIT", "", ""), lines, right=(2, 3)) + f"\n\n{verdict}"
