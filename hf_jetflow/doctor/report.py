"""Terminal output of the doctor."""

from typing import Any

from rich.console import Console
from rich.table import Table


Findings = dict[str, Any]


def print_findings(findings: Findings, console: Console) -> None:
    """Print the facts, figures and changes tried, from the findings of `examine_pair`."""
    console.print(_facts_table(findings))
    if "as_loaded" not in findings:
        return
    for number, compared in enumerate(findings["compared"], 1):
        console.print(f"prompt {number} with the head: {_comparison(compared)}", highlight=False, soft_wrap=True)
    console.print(_tried_table(findings))
    shares = [f"{share:.2f}" for share in findings["as_loaded"]["acceptance_by_depth"]]
    while len(shares) > 1 and shares[-1] == "0.00":  # depths that only n-grams reach
        shares.pop()
    console.print(f"as loaded, accepted by depth: {' '.join(shares)}", highlight=False, soft_wrap=True)
    for untested in findings["untested"]:
        console.print(f"not tested: {untested}", highlight=False, soft_wrap=True)


def verdict_lines(findings: Findings) -> list[str]:
    """The verdict: faults with their fixes, or that there is none; what it rests on, and advice."""
    lines = []
    for fault in findings["faults"]:
        lines += [f"FAULT ({fault['mistake']}): {fault['message']}", *(f"    {line}" for line in fault["fix"])]
    if not lines:
        now = findings["as_loaded"]["tokens_per_round"]
        lines = [f"No fault found: {now:.2f} tokens per round, and reverting no common mistake improves it."]
    if "as_loaded" in findings:
        num_answers = len(findings["as_loaded"]["by_prompt"])
        lines.append(
            f"This rests on {num_answers} answers. More prompts, from your own task, tell more: --prompts FILE "
            f"--num-prompts {max(32, 4 * num_answers)}"
        )
    return lines + [f"advice: {advice}" for advice in findings["advice"]]


def _facts_table(findings: Findings) -> Table:
    target, head, layout = findings["facts"]["target"], findings["facts"]["head"], findings["facts"]["layout"]
    kinds = ["causal" if flag else "bidirectional" for flag in head["is_causal"]]
    causality = kinds[0] if len(set(kinds)) == 1 else ", ".join(kinds)
    causality += f" (from {layout['causality_from']})"
    causality += "".join(f"; overrides {flag}" for flag in layout["overridden"])
    windows = "none" if not any(head["windows"]) else ", ".join(str(window or "full") for window in head["windows"])
    borrowed = [("own" if head[f"own_{what}"] else "the target's") for what in ("embedding", "lm_head")]
    rows = {
        "target": f"{target['name']}: {target['num_layers']} layers of {target['hidden_size']}, "
        f"{target['vocab_size']} tokens ({target['tokenizer_size']} in the tokenizer), {target['dtype']}",
        "head": f"{head['name']}: {head['num_parameters'] / 1e6:.1f} M parameters, {head['num_layers']} layers, "
        f"block {head['block_size']}",
        "trained for": head["trained_for"] or head["trained_for_model_type"] or "not named",
        "layout": layout["layout"],
        "block attention": causality,
        "windows": windows,
        "taps": str(head["hidden_state_indices"]),
        "MASK": "learned embedding" if head["mask_token_id"] is None else f"token {head['mask_token_id']}",
        "draft vocabulary": str(head["draft_vocab_size"] or "all tokens"),
        "embedding, LM head": ", ".join(borrowed),
        "branch correction": head["branch_correction"] or "none",
        "rope": ", ".join(f"{key} {value}" for key, value in head["rope_parameters"].items()),
    }
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _comparison(compared: Findings) -> str:
    if compared["first_difference"] is None:
        return f"all {compared['num_tokens']} tokens equal plain decoding"
    where = f"differs from plain decoding at token {compared['first_difference'] + 1} of {compared['num_tokens']}"
    if compared["margin"] is None:
        return where
    kind = "a fault" if compared["is_fault"] else "a near-tie decided by rounding, no fault"
    return f"{where}, where the target's logits are {compared['margin']:.3f} nats apart: {kind}"


def _tried_table(findings: Findings) -> Table:
    settings, num_prompts = findings["settings"], len(findings["as_loaded"]["by_prompt"])
    title = f"{num_prompts} answers of up to {settings['max_new_tokens']} tokens, {settings['node_budget']} nodes"
    table = Table(title=title)
    table.add_column("change", overflow="fold")
    for column in ("tokens/round", "ratio", "nats/token", ""):
        table.add_column(column, no_wrap=True, justify="right" if column else "left")
    now = findings["as_loaded"]
    table.add_row("as loaded", f"{now['tokens_per_round']:.2f}", "", f"{now['logprob']:.2f}", "")
    for each in findings["mistakes"]:
        change = f"{each['logprob'] - now['logprob']:+.2f}"
        table.add_row(each["change"], *_ratio(each, now), change, "better" if each["is_better"] else "")
    for each in findings["prompt_forms"]:  # other answers: log-probabilities cannot be compared
        table.add_row(f"prompts: {each['form']}", *_ratio(each, now), "", "better" if each["is_better"] else "")
    return table


def _ratio(each: Findings, now: Findings) -> tuple[str, str]:
    ratio = each["tokens_per_round"] / now["tokens_per_round"]
    return f"{each['tokens_per_round']:.2f}", f"{ratio:.2f}"
