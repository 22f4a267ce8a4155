import os
import subprocess
import sys

import pytest
import torch

from kdtoolkit.engine.precision import has_bfloat16, resolve_precision


def capabilities(monkeypatch, *, avx512_bf16=False, amx=False):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize(("found", "expected"), [({}, False), ({"avx512_bf16": True}, True), ({"amx": True}, True)])
def test_a_cpu_has_bfloat16_by_avx512_or_amx(monkeypatch, found, expected):
    capabilities(monkeypatch, **found)
    assert has_bfloat16("cpu") is expected
    assert resolve_precision("auto", torch.device("cpu")) == ("bfloat16" if expected else "float32")


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_instructions_hidden_from_torch_count_as_absent(monkeypatch, name):
    capabilities(monkeypatch, avx512_bf16=True)
    monkeypatch.setenv(name, "avx512_core")
    assert not has_bfloat16("cpu")
    monkeypatch.setenv(name, "AVX512_CORE_BF16")
    assert has_bfloat16("cpu")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_has_bfloat16_from_compute_capability_8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", "cuda:0") == expected


def test_a_precision_that_is_named_is_taken_as_it_is(monkeypatch):
    capabilities(monkeypatch)
    assert resolve_precision("bfloat16") == "bfloat16"
    capabilities(monkeypatch, amx=True)
    assert resolve_precision("float32") == "float32"


def test_torch_has_what_is_asked_of_it():
    code = "from kdtoolkit.engine.precision import has_bfloat16; print(has_bfloat16())"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert has_bfloat16() in (True, False)
