"""Writes what the documentation takes from the code: python docs/generate.py

The whole of docs/spec.md, from the schema of specs; docs/support.md, from docs/support.json, which
--support measures first by compiling the kernels that changed, for an hour or two if that is all of
them; and the parts of other pages between `<!-- generated: ... -->` and `<!-- end -->`. `make
generate` runs it; a test checks that nothing is out of date.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.training.rows import FORMS, HARDER, LENGTHS, MEASURES, Measure, table  # noqa: E402
from nsagen.bench.tables import markdown  # noqa: E402
from nsagen.model import InferenceConfig, ToyLlamaConfig, ToyNSALlamaConfig  # noqa: E402
from nsagen.reports import support_page, target_support  # noqa: E402
from nsagen.spec.schema import json_schema  # noqa: E402

DOCS = ROOT / "docs"
SUPPORT = DOCS / "support.json"

HEAD = """\
# Spec reference

A spec is a YAML file in a small subset of the language: mappings, lists, text, whole numbers, true
and false. Unknown keys are errors, and all errors in a file are reported together. Editors
complete and check specs with `specs/spec.schema.json` (`nsagen inspect --schema` prints it) when a
file begins with `# yaml-language-server: $schema=spec.schema.json`.

This page is generated from that schema.
"""

EXAMPLE = """\
## An example

```yaml title="specs/example.yaml"
name: example
attention:
  head_dim: 128
  gqa_ratio: [16, 4]
  dtype: bfloat16
  compress_type: [weightedpool, linear]
  kernel_size: 32
  kernel_stride: 16
  block_size: 64
  topk: [8, 16]
  window_size: 512
targets: ["cuda:90"]
exclude:
  - {gqa_ratio: 4, topk: 8}            # of the 8 combinations, 2 fall away
  - {compress_type: linear, topk: 16}  # and of the rest 2 more
```

```sh
nsagen inspect example
```
"""

RULES = """\
## Rules between keys

- `kernel_size` and `block_size` are multiples of `kernel_stride`, so that windows and blocks align
  to the same grid.
- `topk` is at least `init_blocks + local_blocks`: these blocks are always selected.
- The keys from `scorer` on name another member of the block-sparse family than NSA: MiniMax-M3's
  learned index, MiniCPM's InfLLM-V2, MoBA. They need `branches: selected`.
- `scorer: index` needs `index_heads`, `index_head_dim`, `kernel_size: 1`, `kernel_stride: 1`,
  `score_norm: none`, `score_heads: each` and `score_pool: max`, and no other scorer takes the first
  two.
- `score_norm: none` needs `score_pool: max`, and takes no `lse_windows`.
- `score_heads: each` needs `gqa_ratio: 1` with compressed keys: attention takes one selection per
  key/value head.
- Members other than NSA compress keys by their plain mean: `compress_type: avgpool`,
  `with_pe: false`.
- `rotary_dim` is at most `head_dim`.
- Every entry of `exclude` matches a combination, and at least one combination remains.
- The lists make at most 4096 combinations.
"""


def spec_reference() -> str:
    """docs/spec.md."""
    schema = json_schema()
    definitions = schema["$defs"]
    top = _table(schema, definitions)
    attention = _table(definitions["AttentionSection"], definitions)
    return "\n".join(
        [
            HEAD,
            "## At the top\n",
            top,
            "## Below `attention`\n",
            "Each key takes one value or a list of values; every combination gets kernels.\n",
            attention,
            "An entry of `exclude` names any of these keys, each with a value or a list. It leaves "
            "out every combination that has one of the listed values for each of its keys.\n",
            RULES,
            EXAMPLE,
        ]
    )


def _table(section: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = ["| key | values | if left out | what it is |", "| --- | --- | --- | --- |"]
    required = section.get("required", [])
    for name, field in section["properties"].items():
        left_out = "required" if name in required else _default(name, field)
        text = field.get("description", "see below" if name == "attention" else "")
        rows.append(f"| `{name}` | {_values(field, definitions)} | {left_out} | {text} |")
    return "\n".join(rows) + "\n"


AS = {
    "v_head_dim": "head_dim",
    "v_compress_type": "compress_type",
    "mlp_hidden": "head_dim",
    "cache_dtype": "dtype",
    "rotary_dim": "head_dim",
}
"""The keys whose value is another one's where they are left out."""


def _default(name: str, field: dict[str, Any]) -> str:
    if "default" not in field:
        return f"as `{AS[name]}`" if name in AS else "none"
    value = field["default"]
    values = value if isinstance(value, list) else [value]
    shown = ", ".join(f"`{_yaml(v)}`" for v in values if v != "")
    return shown or "none"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a key may be, in words; of a value-or-list, the value."""
    if "$ref" in field:
        field = definitions[field["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in field:
        return _values(field["anyOf"][0], definitions)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type")
    if kind == "integer":
        step = f", a multiple of {field['multipleOf']}" if "multipleOf" in field else ""
        return f"{field['minimum']} to {field['maximum']}{step}"
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "array":
        items = _values(field["items"], definitions)
        return f"a list of {items.removeprefix('a ')}s"
    if kind == "object":
        return "a mapping"
    return "lower-case letters, digits and _" if "pattern" in field else "text"


def toy_difference() -> str:
    """The lines that differ between the two toy models once their names are made equal."""
    before, after = (
        (ROOT / "nsagen/model" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("toy_llama", "toy_nsa_llama")
    )
    after = re.sub(r"ToyNSALlama", "ToyLlama", after)
    lines = difflib.unified_diff(
        before.splitlines(),
        after.splitlines(),
        "toy_llama.py",
        "toy_nsa_llama.py",
        n=1,
        lineterm="",
    )
    return "```diff\n" + "\n".join(lines) + "\n```"


def measured(name: str) -> Callable[[], str]:
    """The table of a benchmark on the H200."""
    path = ROOT / "benchmarks/results/nvidia-h200" / f"{name}.json"
    return lambda: markdown(path) if path.is_file() else "Not measured on a GPU yet."


EVIDENCE = ROOT / "benchmarks/results/nvidia-h200/evidence"
RETRIEVAL = (MEASURES["retrieval"], "retrieval", "What each form of attention reaches, by length")
LONGER = (HARDER, "retrieval-longer", "Models asked at lengths that they were not trained for")
TEXT = (MEASURES["text"], "text", "Loss and accuracy on text, by length")


def evidence(
    task: str,
    forms: Sequence[str],
    lengths: Sequence[int],
    measures: Mapping[str, Measure],
    plot: str,
    caption: str,
) -> Callable[[], str]:
    """What `examples/evidence.py` measured on the H200, and its plot once there is one."""

    def text() -> str:
        path = EVIDENCE / f"{task}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        shown = table(rows, forms, lengths, measures)
        there = (EVIDENCE / f"{plot}.png").is_file()
        return f"{shown}\n\n![{caption}](images/{plot}.png)" if there else shown

    return text


def continued() -> str:
    """What `examples/continue_training.py` came to on the H200 at 16384 tokens."""
    path = EVIDENCE / "continue.json"
    if not path.is_file():
        return "Not measured yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = ["|  | steps | loss, nats a byte | distance |", "| --- | ---: | ---: | ---: |"]
    for name, one in found["measured"].items():
        dense = one["dense_loss"]
        rows.append(f"| {name} | {one['step']} | {one['loss']:.3f} | {one['distance']:.3f} |")
    rows.append(f"| the dense model | | {dense:.3f} | |")
    rows.append(
        "\n![Losses of both stages, and the distance to the dense model](images/continue.png)"
    )
    return "\n".join(rows)


LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
NSA: dict[str, Any] = {
    **LLAMA,
    "kernel_size": 32,
    "kernel_stride": 16,
    "block_size": 64,
    "topk": 16,
    "window_size": 512,
}


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def cache_of_slots() -> str:
    """The cache of Llama 3.1 8B, by sequences and their length."""
    models = {
        "dense": ToyLlamaConfig(**LLAMA),
        "NSA": ToyNSALlamaConfig(**NSA),
        "NSA, separate keys and values": ToyNSALlamaConfig(**NSA, branch_kv="separate"),
    }
    heads = [*models, "NSA, cache_dtype float8_e4m3fn or int8"]
    rows = [f"| sequences | tokens of each | {' | '.join(heads)} |", "| ---: | ---: |"]
    rows[1] += " ---: |" * len(heads)
    for batch in (1, 32):
        for length in (8192, 32768, 131072):
            limits = InferenceConfig(max_batch_size=batch, max_length=length)
            sizes = [_gib(limits.cache_bytes(config)) for config in models.values()]
            narrow = replace(limits, cache_dtype="float8_e4m3fn")
            sizes.append(_gib(narrow.cache_bytes(models["NSA"])))
            rows.append(f"| {batch} | {length} | {' | '.join(sizes)} |")
    return "\n".join(rows)


def cache_of_pages() -> str:
    """The cache of 32 slots of up to 131072 tokens, by the tokens that sequences have."""
    rows = ["| tokens of a sequence, on average | pages of 64 tokens | NSA |"]
    rows.append("| ---: | ---: | ---: |")
    for tokens in (8192, 32768, 131072):
        pages = 32 * tokens // 64
        limits = InferenceConfig(32, 131072, paged=True, num_pages=pages)
        rows.append(
            f"| {tokens} | {pages} | {_gib(limits.cache_bytes(ToyNSALlamaConfig(**NSA)))} |"
        )
    return "\n".join(rows)


def cache_of_members() -> str:
    """The caches of models of Transformers, by the tokens of a sequence."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    from nsagen.integrations.minicpm import MiniCPMConfig
    from nsagen.integrations.narrow_cache import cache_bytes

    heads = {"num_attention_heads": 32, "num_key_value_heads": 2}
    minicpm = MiniCPMConfig(hidden_size=4096, num_hidden_layers=32, **heads, sparse_config={})
    kinds = ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    sizes = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
    minimax = MiniMaxM3VLTextConfig(
        num_hidden_layers=60, **sizes, index_head_dim=128, layer_types=kinds
    )
    columns = [f"{name}, bfloat16 | one byte" for name in ("MiniCPM4-8B", "MiniMax-M3")]
    rows = [f"| tokens of a sequence | {' | '.join(columns)} |", "| ---: |" + " ---: |" * 4]
    for tokens in (8192, 32768, 131072):
        found = []
        for config, name in ((minicpm, "sparse_config"), (minimax, "nsagen")):
            for settings in ({}, {"cache_dtype": "int8"}):
                setattr(config, name, settings)
                found.append(_gib(cache_bytes(config, tokens)))
        rows.append(f"| {tokens} | {' | '.join(found)} |")
    return "\n".join(rows)


PARTS = {
    ("docs/serving.md", "slots"): cache_of_slots,
    ("docs/serving.md", "members"): cache_of_members,
    ("docs/serving.md", "pages"): cache_of_pages,
    ("docs/serving.md", "servers"): measured("serve"),
    ("docs/evidence.md", "retrieval"): evidence("retrieval", FORMS, LENGTHS, *RETRIEVAL),
    ("docs/evidence.md", "harder"): evidence("retrieval", FORMS, LENGTHS, *LONGER),
    ("docs/evidence.md", "text"): evidence("text", ("nsa", "dense"), (4096, 16384), *TEXT),
    ("docs/evidence.md", "continued"): continued,
    ("docs/integrate.md", "the difference of the toy models"): toy_difference,
    ("docs/training.md", "measured"): measured("training_table"),
    ("README.md", "whole"): measured("side_by_side"),
    ("docs/results.md", "forward"): measured("prefill"),
    ("docs/results.md", "backward"): measured("train"),
    ("docs/results.md", "decoding"): measured("decode"),
}
"""(page, part) -> what makes it."""


def pages() -> dict[Path, str]:
    """Every generated page and what it should hold."""
    kernels = support_page.page(target_support.read(SUPPORT))
    made = {DOCS / "spec.md": spec_reference(), DOCS / "support.md": kernels}
    for (page, name), make in PARTS.items():
        path = ROOT / page
        text = made.get(path) or path.read_text(encoding="utf-8")
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        made[path] = f"{head}{start}\n{make()}\n\n{end}{tail}"
    return made


def measure_support(jobs: int | None) -> None:
    """Bring docs/support.json up to date; what it knows is not compiled again."""

    def report(what: str, done: int, total: int) -> None:
        print(f"{done} of {total}: {what}", flush=True)

    known = target_support.read(SUPPORT)
    wanted = target_support.variants(target_support.shipped())
    target_support.write(SUPPORT, target_support.measure(wanted, known, jobs, report))


def main() -> int:
    parser = argparse.ArgumentParser(description="What the documentation takes from the code.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a page is old"
    )
    parser.add_argument("--support", action="store_true", help="measure kernels that changed first")
    parser.add_argument("--jobs", type=int, help="processes that compile; default: one a core")
    given = parser.parse_args()
    if given.support:
        measure_support(given.jobs)
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text("utf-8") != text]
    for path in stale:
        if not given.check:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{'out of date' if given.check else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
