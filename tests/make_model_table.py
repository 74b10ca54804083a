"""Write docs/models.md: what the installed Transformers' causal language models do under sparse attention.

    python tests/make_model_table.py [path]

Every class is built tiny and compared with its own eager attention (`parity.verify`), about two minutes on
one core.
"""

import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from parity import MODES, Verdict, verify
from tiny_models import class_names, model_types

PATH = Path(__file__).parent.parent / "docs" / "models.md"

INTRO = """\
# Models

<!-- Written by `python tests/make_model_table.py`; do not edit. -->

All {total} causal language model classes of Transformers {version}: those that `AutoModelForCausalLM` loads,
then other exported `*ForCausalLM`.

| | classes |
|---|---|
| supported, parity verified | {exact} |
| supported, parity broken | {broken} |
| not supported | {unsupported} |
| not built here | {unbuilt} |

*Parity verified*: a tiny random model of the class gives the same logits and tokens with the attention `sah`
as with its own eager attention in every mode below, once with every layer going through `causal`, the masker
that selects every key, once with `maskers: []`, and, where the model windows some of its layers, once with
those left as they are. *Not supported* is what `sah_transformers.supported(model)` answers, and its reason.

| mode | what runs |
|---|---|
| forward | logits of two prompts |
| padded | the same, one prompt left-padded |
| chunked | the padded prompts in two forward calls with a cache |
| dynamic | greedy `generate()`, padded, the default cache |
| static | greedy `generate()`, padded, `cache_implementation="static"` |
| unpadded | the same without padding |
| beams | `generate(num_beams=3)`, padded |
"""


def status(verdict: Verdict) -> str:
    if verdict.unbuilt:
        return "not built here"
    if verdict.unsupported:
        return "not supported"
    return "parity verified" if verdict.exact else "parity broken"


def note(verdict: Verdict) -> str:
    """The reason of an unhappy status, or the modes that eager attention itself cannot do."""
    if reason := verdict.unbuilt or verdict.unsupported:
        return reason
    if verdict.differences:
        return "; ".join(f"{where}: {how}" for where, how in verdict.differences.items())
    done = [mode for mode in MODES if mode not in verdict.skipped]
    if not verdict.skipped:
        return ""
    failures = "; ".join(f"{mode} fails in eager: {why}" for mode, why in verdict.skipped.items())
    return f"{', '.join(done)} only; {failures}"


def table(verdicts: Iterable[Verdict]) -> str:
    lines = ["| class | model type | | note |", "|---|---|---|---|"]
    for verdict in verdicts:
        types = ", ".join(f"`{t}`" for t in model_types().get(verdict.name, []))
        text = note(verdict).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{verdict.name}` | {types} | {status(verdict)} | {text} |")
    return "\n".join(lines)


def page(verdicts: list[Verdict]) -> str:
    counts = [status(verdict) for verdict in verdicts]
    intro = INTRO.format(
        total=len(verdicts),
        version=transformers.__version__,
        exact=counts.count("parity verified"),
        broken=counts.count("parity broken"),
        unsupported=counts.count("not supported"),
        unbuilt=counts.count("not built here"),
    )
    return f"{intro}\n{table(verdicts)}\n"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    verdicts = []
    for name in class_names():
        verdicts.append(verify(name))
        print(f"{name}: {status(verdicts[-1])}", file=sys.stderr)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(verdicts))


if __name__ == "__main__":
    main()
