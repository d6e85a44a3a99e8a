"""Every form of the kernels writes the same text, and a variable says which form is the best to use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgellm.cli import main
from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile import isa
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

FORMS = isa.available_forms()
N_TOKENS = 24


@pytest.fixture
def set_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """set_form(name): as if the process had been started with the variable."""

    def choose(name: str) -> None:
        monkeypatch.setenv(isa.FORM_VARIABLE, name)
        isa.detect.cache_clear()

    yield choose
    isa.detect.cache_clear()


# ---- the variable ----------------------------------------------------------------------------------------------------


def test_the_variable_makes_a_cpu_of_fewer_features(set_form: Callable[[str], None]) -> None:
    for i, form in enumerate(FORMS):
        set_form(form)
        assert isa.available_forms() == FORMS[i:]
        assert isa.detect().name == form
        assert isa.cpu_forms()[-len(FORMS) :] == FORMS


@pytest.mark.skipif(len(FORMS) < 2, reason="this CPU runs one form only")
def test_what_the_variable_excludes_cannot_be_asked_for(set_form: Callable[[str], None]) -> None:
    set_form("portable")
    with pytest.raises(ParameterError, match="EDGELLM_CPU_FORM excludes it; it runs portable"):
        isa.detect(FORMS[0])


@pytest.mark.parametrize("name", ["sse9", "neon, avx2", "PORTABLE"])
def test_a_form_that_this_cpu_lacks_is_refused_by_name(name: str, set_form: Callable[[str], None]) -> None:
    set_form(name)
    with pytest.raises(ParameterError, match=f"EDGELLM_CPU_FORM is '{name}', but this CPU runs .*portable") as caught:
        isa.detect()
    assert caught.value.code == "KERNEL_FORM"


def test_an_empty_variable_means_the_best(set_form: Callable[[str], None]) -> None:
    set_form("")
    assert isa.available_forms() == isa.cpu_forms()


def test_doctor_shows_what_was_set(set_form: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    set_form("portable")
    assert main(["doctor", "--no-selftest", "--no-bandwidth"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels"))
    assert line.split()[1] == "portable" and "EDGELLM_CPU_FORM=portable" in line
    assert all(form in line for form in isa.cpu_forms())


# ---- the same text ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same_text() -> ModuleType:
    """The program of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
        return importlib.import_module("same_text")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def runs(request: pytest.FixtureRequest, same_text: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list:
    """A run of six prompts in each form, the last one beyond a cut of attention."""
    path = tmp_path_factory.mktemp("forms") / "tiny.gguf"
    tiny_models.write_tiny_model(path, request.param, "Q4_K", quants={"attn_v.weight": "Q6_K"})
    rng = np.random.default_rng(0)
    with GGUFFile.open(path) as file:
        program = build_program(file)
        texts = [rng.integers(0, program.n_vocab, n).tolist() for n in (1, 2, 5, 17, 40, 270)]
        return [same_text.greedy(program, form, texts, N_TOKENS, streams=4) for form in FORMS]


def test_every_form_writes_the_same_text_or_two_tokens_were_level(same_text: ModuleType, runs: list) -> None:
    for other in runs[1:]:
        result = same_text.compare(runs[0], other)
        assert result.explained, same_text.report(result, 0)
        assert result.largest_move < 1e-3
        assert result.n_steps > N_TOKENS


def test_forms_with_a_fused_multiply_add_write_the_same_bits(same_text: ModuleType, runs: list) -> None:
    fused = [run for run in runs if run.form != "portable"]
    for other in fused[1:]:
        result = same_text.compare(fused[0], other)
        assert result.n_same_bits == result.n_steps == len(other.best) * N_TOKENS


def test_a_difference_is_found_where_it_begins(same_text: ModuleType, runs: list, tmp_path: Path) -> None:
    runs[0].save(tmp_path / "run.npz")
    other = same_text.Run.load(tmp_path / "run.npz")
    assert same_text.compare(runs[0], other).n_same_bits == 6 * N_TOKENS
    best, checksum = other.best.copy(), other.checksum.copy()
    best[2, 5], best[2, 9], checksum[2, 5] = best[2, 5] + 1, 0, checksum[2, 5] ^ 1
    result = same_text.compare(runs[0], same_text.Run(**vars(other) | {"best": best, "checksum": checksum}))
    assert [(d.prompt, d.position) for d in result.differences] == [(2, 5)]
    assert (result.n_equal, result.n_steps, result.n_same_bits) == (5, 5 * N_TOKENS + 6, 5 * N_TOKENS + 5)
    assert not result.explained  # nothing moved anywhere else
