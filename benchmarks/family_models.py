"""Parts of family.py: MiniMax-M3 and MiniCPM4 in Transformers."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from family_run import Layer, Run, Sizes
from torch import Tensor

from nsagen.cases.base import relative_error
from nsagen.ops import local_band


def m3_config(layer: Layer, layers: int = 1, **changes: Any) -> Any:
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as m3

    return m3.MiniMaxM3VLTextConfig(
        **{
            "vocab_size": 97,
            "hidden_size": layer.hidden,
            "intermediate_size": 64,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "head_dim": layer.dim,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_n_heads": layer.kv_heads,
            "index_head_dim": layer.dim,
            "index_block_size": layer.block,
            "index_topk_blocks": layer.topk,
            "layer_types": ["minimax_m3_sparse"] * layers,
            "mlp_layer_types": ["dense"] * layers,
            "max_position_embeddings": 524288,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **changes,
        }
    )


def m3_model(config: Any, s: Sizes, attention: str) -> Any:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

    import nsagen.integrations.transformers  # noqa: F401

    torch.manual_seed(0)  # weights are drawn on the CPU: the same for every device
    model: Any = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation=attention)
    return model.to(s.device, s.dtype).eval()


def m3_in_transformers(run: Run) -> None:
    """One attention layer, projections and indexer included, by hooks around the module."""
    s = run.sizes
    model = m3_model(m3_config(s.m3), s, "nsagen")
    kinds = [("nsagen", n, False) for n in (s.lengths[0], s.lengths[-1])]
    kinds += [("nsagen, band", n, True) for n in (s.lengths[0], s.lengths[-1])]
    kinds += [("sdpa", s.lengths[0], False)] if run.times else []
    outputs: dict[str, Tensor] = {}
    for how, tokens, band in kinds:
        if time.monotonic() > run.end:
            run.skipped.append(f"M3 layer in Transformers, {how}, {tokens}")
            continue
        local_band.ASKED = "1" if band else "0"
        model.set_attn_implementation(how.split(",")[0])
        ids = torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ms, peak, o = _layer(model, ids.to(s.device), s, 3 if run.times else 1)
        if run.times:
            row = {"what": "M3 layer in Transformers", "how": how, "tokens": tokens}
            run.rows.append({**row, "ms": ms, "peak_gib": peak})
            print(f"{row}: {ms:.3f} ms, {peak:.2f} GiB", flush=True)
        outputs[f"{how}, {tokens}"] = o.cpu()  # so that it is in no later peak
        del o
    for tokens in dict.fromkeys(tokens for _, tokens, _ in kinds):
        expected = outputs.get(f"nsagen, {tokens}")
        for how, limit in (("nsagen, band", 0.01), ("sdpa", 0.05)):  # its scores round otherwise
            found = outputs.get(f"{how}, {tokens}")
            if found is not None and expected is not None:
                run.agree(f"M3 layer in Transformers, {how}, {tokens}", found, expected, limit)


def _layer(model: Any, ids: Tensor, s: Sizes, calls: int) -> tuple[float, float, Tensor]:
    """(median ms of the attention module, peak GiB of the whole call, the module's output)."""
    stamps: list[Any] = []
    outputs: list[Tensor] = []

    def stamp() -> None:
        if s.device == "cpu":
            stamps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        stamps.append(event)

    def after(_: Any, __: Any, found: Any) -> None:
        stamp()
        if len(stamps) == 2 * (calls + 1):
            outputs.append(found[0])

    module = model.model.layers[0].self_attn
    hooks = [
        module.register_forward_pre_hook(lambda *_: stamp()),
        module.register_forward_hook(after),
    ]
    if s.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(calls + 1):
        model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    pairs = list(zip(stamps[2::2], stamps[3::2], strict=True))
    if s.device == "cpu":
        return 1e3 * statistics.median(b - a for a, b in pairs), 0.0, outputs[0]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return statistics.median(a.elapsed_time(b) for a, b in pairs), peak, outputs[0]


def small_models(run: Run) -> None:
    """Small random models in bfloat16 against float32 ones on the CPU. Rounding may choose other
    blocks, so the bound is wide; Transformers' own attention stands beside."""
    s, tiny = run.sizes, run.sizes.device == "cpu"
    cpu = replace(s, device="cpu", dtype=torch.float32)
    layer = s.m3 if tiny else Layer(32, 2, 128, 128, 4, 0, 1, 256)
    config = m3_config(layer, 2, initializer_range=0.05)
    ids = torch.randint(1, 97, (1, 100 if tiny else 1500), generator=torch.manual_seed(3))
    with torch.no_grad():
        if not run.times:
            m3_model(config, s, "nsagen")(ids.to(s.device))
            minicpm_model(replace(s.minicpm, topk=40, hidden=256), "nsagen").to(s.device, s.dtype)(
                ids.to(s.device)
            )
            return
        right = m3_model(config, cpu, "eager")(ids).logits
        errors = {
            kind: relative_error(m3_model(config, s, kind)(ids.to(s.device)).logits.cpu(), right)
            for kind in ("nsagen", "eager")
        }
    _models_agree(run, "MiniMaxM3", errors, s)
    layer = s.minicpm if tiny else replace(s.minicpm, topk=40, hidden=256)
    length = 100 if tiny else 3000
    ids = torch.randint(1, 97, (1, length), generator=torch.manual_seed(3))
    with torch.no_grad():
        models = {kind: minicpm_model(layer, kind) for kind in ("nsagen", "sdpa")}
        logits = {kind: model(ids).logits for kind, model in models.items()}
        errors = {
            kind: relative_error(
                model.to(s.device, s.dtype)(ids.to(s.device)).logits.cpu(), logits[kind]
            )
            for kind, model in models.items()
        }
    if relative_error(logits["nsagen"], logits["sdpa"]) < 1e-4:
        run.wrong["small MiniCPM: is sparse"] = 0.0
    _models_agree(run, "MiniCPM", errors, s)


def _models_agree(run: Run, name: str, errors: dict[str, float], s: Sizes) -> None:
    for kind, error in errors.items():
        run.rows.append({"what": f"small {name}", "how": kind, "tokens": 0, "error": error})
        print(f"small {name}, {kind}: relative error {error:.2e}", flush=True)
    ours, dense = errors.values()
    limit = 1e-5 if s.dtype == torch.float32 else max(2 * dense, 0.05)
    if not ours <= limit:
        run.wrong[f"small {name}"] = ours


def minicpm_model(layer: Layer, attention: str) -> Any:
    from nsagen.integrations.minicpm import MiniCPMConfig, MiniCPMForCausalLM

    sparse = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64}
    window = (layer.local - 1) * layer.block
    if layer.block != 64:
        sparse |= {"kernel_size": 4, "kernel_stride": 2, "block_size": layer.block}
    sparse |= {"window_size": window, "topk": layer.topk - window // layer.block, "dense_len": 0}
    config = MiniCPMConfig(
        vocab_size=97,
        hidden_size=layer.hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=layer.heads,
        num_key_value_heads=layer.kv_heads,
        head_dim=layer.dim,  # pyright: ignore[reportCallIssue]: any key of a config is kept
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=False,
        sparse_config=sparse if attention == "nsagen" else None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = MiniCPMForCausalLM._from_config(config, attn_implementation=attention)
    return model.eval()
