import pytest
import torch
from tiny import tiny_backbone, tiny_config

import arrest_hub
from arrest_hub import estimate, finish, loop
from arrest_hub.errors import ArrestError
from arrest_hub.out_of_memory import fitting_batch, is_out_of_memory
from arrest_hub.prepare import new_accelerator
from arrest_hub.train import finetune


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_full_memory_says(error, full):
    assert is_out_of_memory(error) == full


def full_above(most, tried):
    def attempt(count):
        tried.append(count)
        if count > most:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    return attempt


def test_a_batch_is_halved_until_it_fits():
    accelerator, tried = new_accelerator(), []
    assert fitting_batch(full_above(20, tried), 100, accelerator) == 12
    assert tried == [100, 50, 25, 12]
    assert fitting_batch(full_above(100, tried), 100, accelerator) == 100
    assert fitting_batch(full_above(0, tried), 3, accelerator) == 1, "what one needs is needed in any case"

    def broken(count):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting_batch(broken, 8, accelerator)


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path, monkeypatch):
    def fail(*args, steps):
        raise RuntimeError("shapes")

    monkeypatch.setattr(estimate, "measure_steps", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        estimate.choose_batch_size(tiny_config(tmp_path).validate(), new_accelerator(), tiny_backbone(), None, 1000)


def test_a_full_memory_in_training_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(ArrestError, match=r"too little memory .*2 GiB\): a step of 8 images is too large"):
        finetune(tiny_config(tmp_path))


def test_a_full_memory_in_an_evaluation_is_one_clear_error():
    class Full(torch.nn.Module):
        def forward(self, pixels):
            if len(pixels) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return pixels.mean(dim=(2, 3))

    pair = (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ArrestError, match=r"too little memory .*2 GiB\): 4 images at once are too many, and a smaller"):
        arrest_hub.evaluate(Full(), pair, eps="8/255", attacks="clean", checks=False, batch_size=4, teacher=None)


def test_what_is_tried_is_a_step_of_the_evaluation():
    network = tiny_backbone().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    passes = []
    network.register_forward_hook(lambda module, inputs, output: passes.append((len(inputs[0]), module.training)))
    finish._attack_once(network, torch.device("cpu"), 6)
    assert passes == [(6, False)]
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert finish.evaluation_batch(network, 64, new_accelerator()) == 64, "nothing is tried on a CPU"
    assert len(passes) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_that_trains_need_not_fit_when_evaluated(streaming, tmp_path, monkeypatch, capsys):
    sizes = []
    pgd_batches = finish.EvalSession if not streaming else finish.eval_loader

    def noted(*args, **kwargs):
        sizes.append(args[0].batch_size if not streaming else kwargs["batch_size"])
        return pgd_batches(*args, **kwargs)

    monkeypatch.setattr(finish, "EvalSession" if not streaming else "eval_loader", noted)
    monkeypatch.setattr(finish, "evaluation_batch", lambda network, size, accelerator: size // 4)
    monkeypatch.setattr(finish, "_count_stream" if not streaming else "_measure_images", None)
    changes = {"streaming": True, "epochs": 1, "max_steps": 2} if streaming else {"epochs": 1}
    finetune(tiny_config(tmp_path, batch_size=8, **changes))
    assert set(sizes) == {2}
    assert "evaluated 2 images at a time, not 8" in capsys.readouterr().out
