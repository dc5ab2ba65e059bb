"""Devices: ids on the host beside a target elsewhere, and a default device that is not the target's."""

import copy

import pytest
import torch
from test_batch import PAD, prompts, small_target

from hf_jetflow import JetFlowConfig, JetFlowHead


def head_with(correction=None, **config):
    torch.manual_seed(3)
    settings = dict(num_hidden_layers=2, block_size=6, branch_correction=correction, **config)
    head = JetFlowHead(JetFlowConfig.for_target(small_target().config, **settings)).eval()
    head.generation_config.node_budget = 24
    return head


INPUTS = {
    "one": lambda: dict(input_ids=prompts()["input_ids"][3:4]),
    "batch": prompts,
    "ends": lambda: dict(prompts(), eos_token_id=[4, 5, 6, 7]),
    "sampled": lambda: dict(prompts(), do_sample=True),
    "cache": lambda: dict(prompts(), eos_token_id=[4, 5, 6, 7], return_dict_in_generate=True),
    "penalty": lambda: dict(prompts(), repetition_penalty=1.3),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("correction", [None, "parent", "path"])
def test_no_tensor_of_ours_is_made_on_the_default_device(correction, kind):
    # "meta" stands for "cuda": whatever is made there by mistake fails at the first use.
    head, settings = head_with(correction), dict(max_new_tokens=24, pad_token_id=PAD, do_sample=False)
    settings |= INPUTS[kind]()
    texts = []
    for assistant in (None, head):
        torch.manual_seed(7)
        with torch.device("meta"):
            output = small_target().generate(assistant_model=assistant, **settings)
        texts.append((output if isinstance(output, torch.Tensor) else output.sequences).tolist())
    assert texts[0] == texts[1]
    assert head.last_stats.num_drafted > 0, head.last_stats.policy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@pytest.mark.parametrize("kind", ["one", "batch", "ends", "sampled", "cache", "penalty"])
@pytest.mark.parametrize("head_device", ["cuda", "cpu"])
@pytest.mark.parametrize("config", [dict(), dict(correction="path"), dict(mask_token_id=0)], ids=str)
def test_ids_on_the_host_go_to_a_target_elsewhere_and_come_back(config, head_device, kind):
    target, head = copy.deepcopy(small_target()).to("cuda"), head_with(**config).to(head_device)
    settings = dict(max_new_tokens=24, pad_token_id=PAD, do_sample=False) | INPUTS[kind]()
    outputs = []
    for assistant in (None, head):
        torch.manual_seed(7)
        output = target.generate(assistant_model=assistant, **settings)
        outputs.append(output if isinstance(output, torch.Tensor) else output.sequences)
    assert outputs[0].device == outputs[1].device
    assert outputs[0].tolist() == outputs[1].tolist()
    assert head.last_stats.num_drafted > 0
