"""Support of each family in `families.py`: the checks, and the table in `docs/`.

`python tests/support_matrix.py` runs all checks and writes the table. `test_families.py` runs the same checks.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import build_noisy, build_random
from families import COMMON, FAMILIES, IMAGE_ID, WINDOW
from reference import assert_same_text
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_jetflow import JetFlowHead


TABLE = Path(__file__).parent.parent / "docs" / "support-matrix.md"
COLUMNS = (
    "family",
    "attention",
    "drafts",
    "greedy",
    "sampled",
    "tied embeddings",
    "beyond the window",
    "batches",
    "refused because",
)
NUM_TOKENS = 13  # with the prompts below, more than the windows of the targets
SHORT, LONG = 5, 14  # tokens of the prompts, fewer and more than the windows
NODE_BUDGET = 80  # more than the tokens of the vocabulary, so that a random head's trees hold the right one, too


def is_known(name: str) -> bool:
    """Whether the installed transformers has the family."""
    return (FAMILIES[name].model_type or name) in CONFIG_MAPPING


def build(name: str, tie_word_embeddings: bool = False, **overrides: Any) -> PreTrainedModel:
    """The family's target, with weights that make its text depend on the whole context."""
    family = FAMILIES[name]
    torch.manual_seed(family.seed)
    settings = copy.deepcopy(family.settings)
    for level in (settings, settings.get("text_config", {})):
        level["tie_word_embeddings"] = tie_word_embeddings
    sees = "vision_config" in settings
    config = AutoConfig.for_model(
        family.model_type or name, **(settings if sees else {**COMMON, **settings, **overrides})
    )
    target = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in target.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "embed" in parameter_name else 10)
    target.generation_config.eos_token_id = None
    return target


def prompt(name: str, num_tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens; for families with images, a random image follows the first token."""
    generator, image = torch.Generator().manual_seed(4), FAMILIES[name].image
    highest = IMAGE_ID if image else COMMON["vocab_size"]
    ids = torch.randint(3, highest, (num_tokens,), generator=generator).tolist()
    inputs: dict[str, torch.Tensor] = {}
    if image == "patches":
        ids[1:1] = [IMAGE_ID] * 4
        inputs = dict(pixel_values=torch.randn(16, 96, generator=generator), image_grid_thw=torch.tensor([[1, 4, 4]]))
        inputs["mm_token_type_ids"] = (torch.tensor([ids]) == IMAGE_ID).long()
    elif image:
        ids[1:1] = [IMAGE_ID] * int(image.split()[2])
        inputs = dict(pixel_values=torch.randn(1, 3, 16, 16, generator=generator))
    input_ids = torch.tensor([ids])
    if name == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE_ID).long()
    return dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs)


def check(name: str, target: PreTrainedModel, num_prompt: int, do_sample: bool) -> JetFlowHead:
    """Decode with a head that is often right, and compare with plain decoding, text and random numbers alike."""
    inputs = prompt(name, num_prompt)
    settings = dict(max_new_tokens=NUM_TOKENS, do_sample=do_sample, top_k=0)
    torch.manual_seed(5)
    plain = target.generate(**inputs, **settings)
    state = torch.get_rng_state()
    assert len(set(plain[0, -NUM_TOKENS:].tolist())) > NUM_TOKENS // 4, "the text repeats itself and shows little"
    head = build_noisy(target, plain)
    head.generation_config.node_budget = NODE_BUDGET
    torch.manual_seed(5)
    assert_same_text(plain, target.generate(**inputs, assistant_model=head, **settings))
    assert torch.equal(state, torch.get_rng_state()), "the head draws more or fewer random numbers than plain decoding"
    assert head.last_stats.num_accepted, "no drafted token was accepted, so this shows nothing"
    return head


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    prompts = [prompt(name, num_tokens) for num_tokens in (LONG, SHORT, 10)]
    width = max(each["input_ids"].shape[1] for each in prompts)
    batch = {}
    for key, values in prompts[0].items():
        parts = [each[key] for each in prompts]
        if values.shape == prompts[0]["input_ids"].shape:  # one for each token
            parts = [pad(part, (width - part.shape[1], 0)) for part in parts]
        batch[key] = torch.cat(parts)
    return batch


def check_batch(name: str, target: PreTrainedModel) -> str:
    """Decode prompts of different lengths in one batch, and compare with plain decoding."""
    inputs = batch_of(name)
    head = build_random(target)
    head.generation_config.node_budget = NODE_BUDGET
    settings = dict(max_new_tokens=NUM_TOKENS, do_sample=True, top_k=0, pad_token_id=0)
    torch.manual_seed(5)
    plain = target.generate(**inputs, **settings)
    torch.manual_seed(5)
    drafted = target.generate(**inputs, **settings, assistant_model=head)
    assert drafted.tolist() == plain.tolist(), "a batch is decoded differently with the head"
    if "plain" in head.last_stats.policy:
        return "exact, decoded plainly"
    assert head.last_stats.num_accepted, "no drafted token of a batch was accepted, so this shows nothing"
    return "exact"


def drafts_of(head: JetFlowHead) -> str:
    """Whether the head's latest generation verified trees or chains."""
    stats = head.last_stats
    return "trees" if stats.num_drafted > stats.num_rounds * (head.config.block_size - 1) else "chains"


def row(name: str) -> dict[str, str]:
    """
    Test a family, and return its row of the table.

    Raises:
        AssertionError: If a text differs from plain decoding.
    """
    family, target = FAMILIES[name], build(name)
    cells = dict.fromkeys(COLUMNS, "") | {"family": name, "attention": family.attention}
    try:
        head = check(name, target, SHORT, do_sample=False)
    except ValueError as error:
        if "without `assistant_model`" not in str(error):
            raise
        return cells | {"refused because": str(error)}
    cells["drafts"] = drafts_of(head)
    cells["greedy"] = "exact"
    if family.window is not None:
        check(name, target, LONG, do_sample=False)
        cells["beyond the window"] = "exact"
    cells["batches"] = check_batch(name, target)
    check(name, build(name, tie_word_embeddings=True), SHORT, do_sample=True)
    cells["sampled"] = cells["tied embeddings"] = "exact"
    return cells


HEADER = f"""# Support matrix

Does a draft head work with your target? Each family was tested with a tiny random target in float32 (transformers
{{version}}).

- *exact*: the text and the state of the random number generator equal those of plain `generate`, and drafted tokens
  were accepted. Sampled texts use the same seed.
- *trees*, *chains*: what is drafted. Chains are drafted if the target cannot verify trees.
- beyond the window: a prompt longer than the sliding window of {WINDOW}.
- batches: three prompts of different lengths, padded on the left, sampled. *decoded plainly*: batches of
  this family are decoded without drafts.
- refused because: the call raises this `ValueError` before it generates a token.

`make support-matrix` writes this page from the checks of `tests/test_families.py`.

"""


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(cells[column] for column in COLUMNS) for cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_table() -> dict[str, dict[str, str]]:
    """The committed rows by family."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [dict(zip(COLUMNS, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines[2:]]
    return {cells["family"]: cells for cells in rows}


def main() -> None:
    rows = []
    for name in FAMILIES:
        rows.append(row(name))
        print(*filter(None, rows[-1].values()), sep=" | ")
    text = HEADER.format(version=transformers.__version__) + table(rows)
    part = TABLE.with_suffix(".part")
    part.write_text(text)
    part.replace(TABLE)


if __name__ == "__main__":
    main()
