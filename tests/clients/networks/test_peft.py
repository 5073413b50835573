"""All techniques in PEFT: the LoRA adapters of a GPT-2 are trained, and what they adapt stays as it is."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from tests.clients import plain_torch
from tests.clients.comparison import (
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.fitting import fit
from tests.clients.networks.transformers_models import Wrapped, gpt2, join, loader, loss_of, predicted_tokens
from tests.clients.stack import Stack

LR, EPOCHS = 0.5, 2


def network():
    torch.manual_seed(0)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True)
    return get_peft_model(gpt2(), adapters)


def validation():
    return loader(9, 4, "tokens", seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    stack, watch = Stack(path, warmup=2, count=predicted_tokens), plain_torch.Watch()
    module = Wrapped(network(), LR)
    trainer = fit(module, path, [*stack.callbacks, watch], loader(27, 4, "tokens"), validation())
    return stack, watch, module, trainer


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, _ = run
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    assert_the_same_steps(stack, watch, module, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_checkpoint_holds_both_weights(run):
    assert_the_file_holds_both(run[3].checkpoint_callback.best_model_path, run[0])


def test_the_adapters_that_the_client_saves_are_the_average(run, tmp_path):
    stack, _, module, _ = run
    average = {name.removeprefix("net."): tensor for name, tensor in stack.ema.average_state_dict().items()}
    for name, tensor in get_peft_model_state_dict(module.net).items():
        assert torch.equal(tensor, average[name.replace(".weight", ".default.weight")]), name
    module.net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path).merge_and_unload().eval()
    with torch.no_grad():
        losses = [float(loaded(**batch).loss) for batch in validation()]
    assert float(stack.rows("validation")[-1]["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_merged_network_of_the_raw_weights_is_another(run):
    stack, _, module, _ = run
    raw = copy.deepcopy(module)
    raw.load_state_dict(stack.ema.raw_state_dict())
    merged = raw.net.merge_and_unload().eval()
    with torch.no_grad():
        losses = [float(merged(**batch).loss) for batch in validation()]
    assert float(stack.rows("validation")[-1]["loss"]) != pytest.approx(np.mean(losses), rel=1e-6)
