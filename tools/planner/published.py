"""Throughput that others have published, with what is known of the set-up.

``assumed`` says what a source leaves open and how it is filled here. Only rows whose model, mesh and batch are stated
are taken; runs in 8-bit floating point are left out, for their peak is another. What is compared is tokens a second and
GPU: shares of the peak are counted in different ways by different people.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmagent.models.decoder import DecoderConfig
from mmagent.models.moe import MoEConfig
from tools.planner.hardware import gpu_named
from tools.planner.mesh import Mesh
from tools.planner.steptime import Run
from tools.planner.work import Layer, Load, Model, decoder_layers

LAYERS = frozenset({"decoder"})


@dataclass(frozen=True)
class Row:
    """``tokens``: a second and GPU, as published. ``mfu``: as its source counts it, 0 where it gives none. ``fit``:
    whether constants are fitted to it (else it is only predicted: a set-up that the model says not to describe)."""

    system: str
    model: Model
    run: Run
    tokens: float
    mfu: float
    source: str
    assumed: str = ""
    fit: bool = True


def _model(name: str, layers: list[Layer], width: int, vocabulary: int, tied: bool = False) -> Model:
    table = width * vocabulary
    return Model(name, tuple(layers), width, vocabulary, table, 0 if tied else table, root=width)


def _dense(
    name: str, width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, tied: bool = False
) -> Model:
    config = DecoderConfig(width, layers, layers, heads, kv_heads, width // heads, ffn, qkv_bias=False)
    return _model(name, decoder_layers(config), width, vocabulary, tied)


def _gpt(name: str, width: int, layers: int, heads: int, vocabulary: int, tied: bool = True) -> Model:
    """Two matrices of four widths a feed-forward part cost what three of 8/3 do."""
    model = _dense(name, width, layers, heads, heads, 3, vocabulary, tied)
    layer = replace(model.layers[0], dense=8 * width * width, inner=4 * width)
    return replace(model, layers=(layer,))


LLAMA2_13B = _dense("Llama 2 13B", 5120, 40, 40, 40, 13824, 32000)
LLAMA2_70B = _dense("Llama 2 70B", 8192, 80, 64, 8, 28672, 32000)
LLAMA3_8B = _dense("Llama 3 8B", 4096, 32, 32, 8, 14336, 128256)
LLAMA3_70B = _dense("Llama 3 70B", 8192, 80, 64, 8, 28672, 128256)
LLAMA3_405B = _dense("Llama 3 405B", 16384, 126, 128, 8, 53248, 128256)
KEMPNER_13B = _dense("Llama 13B", 5120, 40, 40, 8, 17920, 128256)
GPT_175B = _gpt("GPT 175B", 12288, 96, 128, 64000)
MPT = {
    "1b": _gpt("MPT 1B", 2048, 24, 16, 50368),
    "3b": _gpt("MPT 3B", 2560, 32, 20, 50368),
    "7b": _gpt("MPT 7B", 4096, 32, 32, 50368),
    "13b": _gpt("MPT 13B", 5120, 40, 40, 50368),
    "30b": _gpt("MPT 30B", 7168, 48, 56, 50368),
    "70b": _gpt("MPT 70B", 8192, 80, 64, 50368),
}


def _qwen3_30b() -> Model:
    moe = MoEConfig(experts=128, top_k=8, shared=0, ffn=768)
    config = DecoderConfig(2048, 48, 0, 32, 4, 128, 6144, moe, qk_norm=True, qkv_bias=False)
    return _model("Qwen3 30B-A3B", decoder_layers(config), 2048, 151936)


def _kempner_moe(experts: int) -> Model:
    moe = MoEConfig(experts=experts, top_k=2, shared=0, ffn=7168)
    config = DecoderConfig(2048, 24, 0, 16, 4, 128, 7168, moe, qkv_bias=False)
    return _model(f"Llama MoE {experts}x2", decoder_layers(config), 2048, 128256)


def _latent(name: str, layers: int, dense: int, heads: int, experts: int, vocabulary: int) -> Model:
    """Latent attention and experts of DeepSeek-V3 (arXiv 2412.19437) and Kimi K2 (arXiv 2507.20534)."""
    width, rank, kv_rank, plain, turned, value = 7168, 1536, 512, 128, 64, 128
    attention = width * rank + rank * heads * (plain + turned) + width * (kv_rank + turned)
    attention += kv_rank * heads * (plain + value) + heads * value * width
    moe = MoEConfig(experts=experts, top_k=8, shared=1, ffn=2048, scale=2.5)
    config = DecoderConfig(width, layers, dense, heads, heads, 128, 18432, moe, qkv_bias=False)
    found = []
    for layer in decoder_layers(config):
        queries = heads * (plain + turned)
        pair = 2 * heads * (plain + turned) + 2 * heads * value
        found.append(replace(layer, attention=attention, queries=queries, keys=queries, pair=pair))
    return _model(name, found, width, vocabulary)


QWEN3_30B, DEEPSEEK_V3 = _qwen3_30b(), _latent("DeepSeek-V3", 61, 3, 128, 256, 129280)
KIMI_K2 = _latent("Kimi K2", 61, 1, 64, 384, 163840)


def _run(
    gpu: str, gpus: int, sequence: int, micro: int, accumulation: int, recompute: str = "", **options: object
) -> Run:
    """``recompute``: "" for none, "full", "attention" (scores and their softmax alone: what a flash kernel does anyway)
    or "ops" (all but the results of every second product and of attention)."""
    mesh = {key: options.pop(key) for key in ("expert", "context", "shards", "tensor", "pipeline", "interleave")
            if key in options}  # fmt: skip
    parallel = options.pop("parallel", "fsdp2" if gpus > 1 else "none")
    if str(parallel).startswith("zero"):  # theirs sends 16 bits each way
        options["reduce"] = 2
    part = {"": 0.0, "full": 1.0, "attention": 0.0, "ops": 0.5}[recompute]
    return Run(
        Mesh(gpus, parallel, **mesh),  # type: ignore[arg-type]
        gpu_named(gpu),
        Load((sequence,) * micro),
        accumulation,
        recompute=LAYERS if part else frozenset(),
        attention_again=recompute == "full",
        part_again=part,
        **options,  # type: ignore[arg-type]
    )


def _megascale() -> list[Row]:
    rows = []
    source = "arXiv 2402.15627, tables 1 and 2"
    for system, own, results in (
        ("Megatron-LM", {},
         {256: 40.0, 512: 21.2, 768: 15.2, 1024: 11.9, 3072: 29.02, 6144: 14.78, 8192: 12.24, 12288: 8.57}),
        ("MegaScale", {"hidden": True, "parallel_block": True},
         {256: 32.0, 512: 16.5, 768: 11.5, 1024: 8.9, 3072: 23.66, 6144: 12.21, 8192: 9.56, 12288: 6.34}),
    ):  # fmt: skip
        shares = {
            "Megatron-LM": (53.0, 49.9, 46.7, 44.7, 48.7, 47.8, 43.3, 41.2),
            "MegaScale": (65.3, 63.5, 61.3, 59.0, 59.1, 57.3, 54.9, 55.2),
        }[system]
        for (gpus, seconds), mfu in zip(results.items(), shares, strict=True):
            batch = 768 if gpus <= 1024 else 6144
            run = _run("a100", gpus, 2048, 1, batch * 64 // gpus, "attention", parallel="zero1", tensor=8, pipeline=8,
                       interleave=6, fused=True, **own)  # fmt: skip
            assumed = "micro-batches of one sequence, no recomputation but in attention"
            assumed += ", 200 Gb/s a GPU" + (", sliding windows not modelled" if own else "")
            rows.append(Row(system, GPT_175B, run, batch * 2048 / seconds / gpus, mfu, source, assumed))
    return rows


def _torchtitan() -> list[Row]:
    rows = []
    old = "torchtitan docs/performance.md (0413364)"
    for model, sequence, micro, again, tokens, mfu in (
        (LLAMA3_8B, 8192, 1, "ops", 2973, 58.2),
        (LLAMA3_70B, 8192, 1, "full", 331, 51.7),
        (LLAMA2_13B, 4096, 2, "", 2162, 61.1),
        (LLAMA2_13B, 4096, 2, "ops", 1904, 53.8),
        (LLAMA2_70B, 4096, 1, "ops", 355, 50.8),
        (LLAMA2_70B, 4096, 2, "full", 353, 50.5),
    ):
        run = _run("a100", 64, sequence, micro, 1, again, fused=True)
        rows.append(Row("torchtitan", model, run, tokens, mfu, old, "compiled; network of 200 Gb/s a GPU"))
    new = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
    for gpus, fused, tokens in ((8, False, 5762), (8, True, 6667), (128, False, 5605), (128, True, 6514)):
        run = _run("h100-96gb", gpus, 8192, 2, 1, "ops", fused=fused)
        mfu = 39.0 if fused else 33.0
        rows.append(Row("torchtitan", LLAMA3_8B, run, tokens, mfu, new, "H100 at 500 W, HBM2e; peak of the 700 W part"))
    return rows


def _foundry() -> list[Row]:
    """Every size, with few and many GPUs and with short and long sequences; sizes of models from their yamls."""
    rows = []
    source = "llm-foundry scripts/train/benchmarking/README.md (061f2c7)"
    for gpu, table in (
        ("h100", (
            ("70b", 64, 2048, 8, 4, "full", 1039, 42.57), ("70b", 32, 2048, 2, 16, "full", 882, 36.15),
            ("30b", 32, 2048, 14, 3, "full", 2308, 43.92), ("30b", 8, 8192, 1, 21, "full", 1384, 29.92),
            ("30b", 8, 2048, 3, 21, "full", 2002, 38.11), ("13b", 64, 2048, 2, 1, "", 4800, 39.86),
            ("13b", 8, 2048, 2, 1, "", 4792, 39.79), ("13b", 8, 32768, 1, 3, "full", 1976, 31.68),
            ("7b", 8, 2048, 6, 1, "", 10643, 46.44), ("7b", 8, 8192, 8, 2, "full", 6935, 37.14),
            ("7b", 8, 65536, 1, 2, "full", 1956, 28.59), ("3b", 64, 2048, 6, 3, "", 22525, 40.80),
            ("1b", 8, 2048, 14, 1, "", 45455, 41.82),
        )),
        ("a100", (
            ("70b", 64, 2048, 8, 4, "full", 410, 53.33), ("70b", 32, 2048, 2, 16, "full", 373, 48.56),
            ("30b", 8, 8192, 1, 21, "full", 574, 39.38), ("30b", 8, 2048, 3, 21, "full", 916, 55.30),
            ("13b", 8, 2048, 2, 3, "", 2262, 59.57), ("13b", 8, 32768, 1, 3, "full", 1016, 51.69),
            ("7b", 8, 2048, 6, 2, "", 4641, 64.23), ("7b", 8, 8192, 8, 2, "full", 3206, 54.47),
            ("7b", 8, 65536, 1, 2, "full", 1013, 46.97), ("1b", 8, 2048, 14, 4, "", 20513, 59.86),
        )),
        ("a100-40gb", (
            ("70b", 128, 2048, 4, 1, "full", 376, 48.91), ("30b", 128, 2048, 6, 1, "full", 865, 52.25),
            ("13b", 128, 2048, 16, 1, "full", 1972, 51.93), ("7b", 128, 2048, 18, 1, "full", 3623, 50.14),
            ("3b", 128, 2048, 6, 1, "", 9538, 54.80),
        )),
    ):  # fmt: skip
        for size, gpus, sequence, micro, accumulation, again, tokens, mfu in table:
            run = _run(gpu, gpus, sequence, micro, accumulation, again, fused=False, reduce=2)
            assumed = "eager kernels with flash attention; network of 200 (A100) or 400 Gb/s a GPU"
            rows.append(Row("llm-foundry", MPT[size], run, tokens, mfu, source, assumed))
    return rows


def _kempner() -> list[Row]:
    rows = []
    source = "KempnerForge benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md"
    for model, gpus, tensor, tokens, mfu in (
        (LLAMA3_8B, 1, 1, 10471, 57.8), (LLAMA3_8B, 2, 1, 18728, 51.7), (LLAMA3_8B, 4, 1, 38983, 53.8),
        (LLAMA3_8B, 4, 4, 25135, 34.7), (LLAMA3_8B, 8, 4, 44299, 30.6), (LLAMA3_8B, 32, 4, 155917, 26.9),
        (KEMPNER_13B, 8, 1, 35405, 44.4), (KEMPNER_13B, 16, 4, 53814, 33.7), (KEMPNER_13B, 32, 4, 104309, 32.7),
        (LLAMA3_70B, 32, 4, 17657, 25.4),
    ):  # fmt: skip
        micro, accumulation = (2, 4) if model is LLAMA3_70B else (4, 4 if model is KEMPNER_13B else 2)
        compiled = not (model is KEMPNER_13B and gpus == 8)
        run = _run("h200", gpus, 4096, micro, accumulation, "full", tensor=tensor, fused=compiled, once=True)
        run = replace(run, gpu=replace(run.gpu, host=4))
        assumed = "every micro-batch gathers; network of 400 Gb/s a GPU"
        rows.append(Row("KempnerForge", model, run, tokens / gpus, mfu, source, assumed))
    source = "KempnerForge benchmarks/moe_packed/moe_packed_benchmark.md"
    for experts, tokens, mfu in ((8, 50972, 11.8), (16, 36860, 8.4)):
        run = _run("h200", 8, 4096, 4, 1, "full", fused=False)
        run = replace(run, gpu=replace(run.gpu, host=4))
        assumed = "inner width 7,168 from the parameters given; their experts run one by one or as dense batches"
        rows.append(Row("KempnerForge", _kempner_moe(experts), run, tokens / 8, mfu, source, assumed, fit=False))
    return rows


def _automodel() -> list[Row]:
    """Their balanced gate gives every token neighbouring experts, which lie on one or two ranks: ``copies``."""
    source = "NeMo AutoModel docs/performance-summary.md (2025-10-02), examples/benchmark/configs"
    assumed = "network of 400 Gb/s a GPU"
    both = {"fused": True, "once": True}
    deep = {"pipeline": 4, "expert": 64, "interleave": 8, **both, "copies": 2.0, "stays": True}
    kimi = {"pipeline": 8, "expert": 32, "interleave": 4, **both, "copies": 4 / 3, "flushes": 2}
    return [
        Row("AutoModel", QWEN3_30B, _run("h100", 8, 4096, 4, 16, "full", expert=8, copies=1.0, **both),
            12040, 28.0, source, assumed),
        Row("AutoModel", DEEPSEEK_V3, _run("h100", 256, 4096, 1, 8, "full", **deep), 1002, 25.3, source, assumed),
        Row("AutoModel", DEEPSEEK_V3, _run("h100", 1024, 4096, 1, 32, "full", flushes=4, **deep),
            865, 21.8, source, assumed),
        Row("AutoModel", KIMI_K2, _run("h100", 256, 4096, 1, 16, "full", **kimi), 924, 19.1, source, assumed),
    ]  # fmt: skip


def _llama3() -> list[Row]:
    """Teraflops a GPU, from which tokens follow by the operations that the source counts: 6 N and attention whole."""
    rows = []
    source = "arXiv 2407.21783, table 4"
    for gpus, context, sequence, batch, teraflops, mfu in (
        (8192, 1, 8192, 32, 430, 43.0), (16384, 1, 8192, 16, 400, 41.0), (16384, 16, 131072, 16, 380, 38.0),
    ):  # fmt: skip
        run = _run("h100", gpus, sequence, 1, batch, tensor=8, pipeline=16, context=context, interleave=8,
                   parallel="zero2", fused=True, gathers_keys=True, once=True)  # fmt: skip
        pairs = 12.0 * 126 * 16384 * sequence / 2
        tokens = teraflops * 1e12 / (6 * LLAMA3_405B.active + pairs)
        assumed = "8 virtual stages, no recomputation; operations of causal attention"
        rows.append(Row("Llama 3", LLAMA3_405B, run, tokens, mfu, source, assumed))
    return rows


def rows() -> list[Row]:
    """All of them, by system."""
    return [*_megascale(), *_torchtitan(), *_foundry(), *_kempner(), *_automodel(), *_llama3()]
