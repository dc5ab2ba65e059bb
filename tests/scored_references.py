"""Independent references of the layouts whose heads score branches: a file's tensors and the papers' formulas.

They are slow and plain: one block, one path, no cache. Nothing of `hf_jetflow` is used.
"""

from collections.abc import Callable

import make_layouts as make
import torch
from make_layouts import BLOCK, LAYERS, MASK, VOCAB, Config, Tensors
from make_scored_layouts import GROUP, RANK, TOP_K
from torch import sigmoid, tanh
from torch.nn.functional import silu


HEADS, KEY_HEADS, DIM, THETA = 4, 2, 16, 5000
Path = list[int]  # the token before the anchor, the anchor, drafted tokens
Logits = Callable[[int, Path], torch.Tensor]  # of a depth, behind a path


def norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """States (rows, heads, dim) at positions (rows,)."""
    angles = positions[:, None] * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = (table.repeat(1, 2)[:, None] for table in (angles.cos(), angles.sin()))
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], -1) * sin


def convolve(tensors: Tensors, name: str, side: int, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    base = tensors[f"{name}.base_kernel"]
    dynamic = (inputs @ tensors[f"{name}.kernel_projection.weight"].T).view(len(rows), 2, 2, -1)
    output = torch.zeros_like(rows)
    for t in range(len(rows)):
        for tap in range(min(2, t + 1)):
            kernel = base[side, tap] + dynamic[t, side, tap].repeat_interleave(GROUP)
            output[t] += kernel * rows[t - tap]
    return output


def block_rows(tensors: Tensors, features: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a bidirectional block after the final norm and before it; features (seq, taps x hidden)."""
    num_context, num_rows = len(features), len(embeds)
    positions = torch.arange(num_context + num_rows, dtype=torch.float32)
    rows = embeds
    for layer in range(LAYERS):
        own = {name.removeprefix(f"layers.{layer}."): value for name, value in tensors.items()}
        context = torch.zeros(num_context, embeds.shape[1])
        if "fc.weight" in own:
            context = context + features @ own["fc.weight"].T
        if "layer_fusion_weights" in own:
            shares = own["layer_fusion_weights"][layer].softmax(0)
            context = context + (features.view(num_context, len(shares), -1) * shares[:, None]).sum(1)
        context = norm(context, own["hidden_norm.weight"])
        has_convs = "attention_conv.base_kernel" in own
        normed = norm(rows, own["input_layernorm.weight"])
        inner = convolve(own, "attention_conv", 0, normed, normed) if has_convs else normed
        states = {}
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            states[name] = inner @ own[f"self_attn.{name}_proj.weight"].T
            if name != "q":
                weight = own.get(f"self_attn.{name}_proj_target.weight", own[f"self_attn.{name}_proj.weight"])
                states[name] = torch.cat([context @ weight.T, states[name]])
            states[name] = states[name].view(-1, heads, DIM)
        query = rotate(norm(states["q"], own["self_attn.q_norm.weight"]), positions[num_context:])
        key = rotate(norm(states["k"], own["self_attn.k_norm.weight"]), positions)
        key, value = (each.repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in (key, states["v"]))
        weights = (torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5).softmax(-1)
        output = torch.einsum("hqk,khd->qhd", weights, value).flatten(1) @ own["self_attn.o_proj.weight"].T
        rows = rows + (convolve(own, "attention_conv", 1, normed, output) if has_convs else output)
        normed = norm(rows, own["post_attention_layernorm.weight"])
        inner = convolve(own, "mlp_conv", 0, normed, normed) if has_convs else normed
        output = silu(inner @ own["mlp.gate_proj.weight"].T) * (inner @ own["mlp.up_proj.weight"].T)
        output = output @ own["mlp.down_proj.weight"].T
        rows = rows + (convolve(own, "mlp_conv", 1, normed, output) if has_convs else output)
    return norm(rows, tensors["norm.weight"]), rows


def by_plain_names(tensors: Tensors) -> Tensors:
    """The tensors of a file without the prefixes and names of single dialects."""
    names = {"model.": "", "context_proj.": "fc.", "context_norm.": "hidden_norm.", "final_norm.": "norm."}
    names |= {"markov_head.": "", "encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
    plain = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("logit_head.")
        old = next((old for old in names if name.startswith(old)), "")
        plain[names.get(old, "") + name.removeprefix(old)] = tensor
    return {name.replace("codebook.weight", "codebook"): tensor for name, tensor in plain.items()}


def reference(
    config: Config, tensors: Tensors, target: torch.nn.Module, features: torch.Tensor, anchor: int
) -> Logits:
    """Logits (draft_vocab,) of a depth behind a path, as the layout's own project computes them."""
    tensors = by_plain_names(tensors)
    section = {**config, **(config.get("dflash_config") or {})}
    embedding = tensors.get("embed_tokens.weight", target.get_input_embeddings().weight.detach())
    output = tensors.get("lm_head.weight", target.get_output_embeddings().weight.detach())
    predicts = section.get("sample_from_anchor", section.get("shift_label"))
    if predicts is None:
        predicts = config["architectures"][0] in ("Qwen3DSparkModel", "DSparkDraftModel", "Qwen3DFlyModel")
    num_rows, first = section["block_size"], 0 if predicts else 1
    assert num_rows == BLOCK - predicts
    block = embedding[[anchor] + [MASK] * (num_rows - 1)] * section.get("input_embedding_scale", 1.0)
    rows, residual = block_rows(tensors, features, block)
    is_muse = config["architectures"] == ["MuseGlimmerAssistantModel"]  # whose target has both
    logits = rows @ output.T * section.get("output_multiplier", 2.0 if is_muse else 1.0)
    cap = section.get("final_logit_softcapping", 20.0 if is_muse else None)
    logits = logits if cap is None else cap * tanh(logits / cap)
    scorer = next((make_scorer for key, make_scorer in SCORERS.items() if key in tensors), None)
    if scorer is None:
        return lambda depth, path: logits[depth + first]
    return scorer(tensors, section, rows, residual, logits, embedding, output, first)


def selector(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    def scored(depth: int, path: Path) -> torch.Tensor:
        before = tensors["candidate_selector.predecessor_codebook"][path[-1]]
        hidden = tensors["candidate_selector.hidden_projection.weight"] @ rows[depth + first]
        kept = logits[depth + first].topk(TOP_K).indices
        pairs = tensors["candidate_selector.successor_codebook"][kept] @ (before * hidden)
        scores = torch.full((VOCAB,), -torch.inf)
        scores[kept] = logits[depth + first][kept] + pairs
        # The probability of all candidates together stays what the row says.
        return scores.log_softmax(-1) + logits[depth + first].softmax(-1)[kept].sum().log()

    return scored


def markov(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    kind = section["markov_head_type"]

    def scored(depth: int, path: Path) -> torch.Tensor:
        tokens, state = path[1:], torch.zeros(RANK)
        steps = list(zip(range(first, first + depth + 1), tokens, strict=True))
        if first:
            steps = [(0, tokens[0]), *steps]
        for row, token in steps:
            embed = tensors["markov_w1.weight"][token]
            factors = embed
            if kind == "gated":
                both = torch.cat([rows[row], embed])
                factors = sigmoid(tensors["gate_proj.weight"] @ both + tensors["gate_proj.bias"]) * embed
            if kind == "rnn":
                joint = (
                    tensors["joint_proj.weight"] @ torch.cat([state, embed, rows[row]]) + tensors["joint_proj.bias"]
                )
                gate, content, out = joint.chunk(3)
                state = sigmoid(gate) * state + (1 - sigmoid(gate)) * tanh(content)
                factors = tanh(out)
        return logits[depth + first] + tensors["markov_w2.weight"] @ factors

    return scored


def treeflash(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    own = {name.removeprefix("ar_approximation."): tensor for name, tensor in tensors.items()}

    def scored(depth: int, path: Path) -> torch.Tensor:
        row = depth + first
        inputs = torch.cat([norm(embedding[path[-1]], own["norm.weight"]), rows[row]])
        up, gate = (own["ug.weight"] @ inputs + own["ug.bias"]).chunk(2)
        changed = residual[row] + own["d.weight"] @ (silu(gate) * up)
        return output @ norm(changed, tensors["norm.weight"])

    return scored


def dfly(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    own = {name.removeprefix("hidden_correction."): tensor for name, tensor in tensors.items() if "hidden_c" in name}

    def scored(depth: int, path: Path) -> torch.Tensor:
        row = rows[depth + first]
        both = [norm(row, own["hidden_norm.weight"]), norm(embedding[path[-1]], own["embed_norm.weight"])]
        inner = silu(own["gate_proj.weight"] @ torch.cat(both)) * (own["up_proj.weight"] @ torch.cat(both))
        return output @ (row + own["down_proj.weight"] @ inner)

    return scored


def domino(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    state_size = tensors["prefix_gru.weight_hh_l0"].shape[1]
    gru = torch.nn.GRU(embedding.shape[1], state_size, bias=False)
    gru.load_state_dict({name: tensors[f"prefix_gru.{name}"] for name in ("weight_ih_l0", "weight_hh_l0")})

    def scored(depth: int, path: Path) -> torch.Tensor:
        row = depth + first
        if depth < section["pure_draft_prefix_len"]:
            return logits[row]
        states, _ = gru(embedding[path[1:]])
        inner = silu(tensors["embed_proj.0.weight"] @ torch.cat([rows[row], states[-1]]))
        return logits[row] + tensors["embed_proj.2.weight"] @ inner

    return scored


def refiner(tensors, section, rows, residual, logits, embedding, output, first) -> Logits:
    own = {name.removeprefix("refiner_head."): tensor for name, tensor in tensors.items()}

    def scored(depth: int, path: Path) -> torch.Tensor:
        row, tokens = depth + first, path if first else path[1:]
        latents = []
        for index, token in enumerate(tokens):
            parts = [own["down_h.weight"] @ rows[index], own["down_g.weight"] @ rows.mean(0)]
            latents.append(own["in_proj.weight"] @ torch.cat([*parts, own["token_embed.weight"][token]]))
        assert len(latents) == row + 1
        mixed = latents[row] + sum(own["mix_l"][:, row, index] * latents[index] for index in range(row + 1))
        inner = silu(own["mlp_gate.weight"] @ mixed) * (own["mlp_up.weight"] @ mixed)
        return logits[row] + own["readout.weight"] @ (mixed + own["mlp_down.weight"] @ inner)

    return scored


# By a tensor of the layout.
SCORERS = {
    "candidate_selector.predecessor_codebook": selector,
    "markov_w1.weight": markov,
    "ar_approximation.d.weight": treeflash,
    "hidden_correction.down_proj.weight": dfly,
    "prefix_gru.weight_ih_l0": domino,
    "refiner_head.mix_l": refiner,
}
assert make.HIDDEN == HEADS * DIM
