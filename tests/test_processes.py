"""What processes ask each other, with another one that is only imagined."""

import torch

from arrest_hub.processes import AnyProcessBefore, any_process


class Imagined:
    """An Accelerator's answer where ``others`` processes have their flags set."""

    device = torch.device("cpu")

    def __init__(self, num_processes, others=0):
        self.num_processes, self.others, self.calls = num_processes, others, 0

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.calls += 1
        return tensor + self.others


def test_one_process_asks_nobody():
    alone = Imagined(1)
    told = AnyProcessBefore(alone)
    assert [any_process(alone, flag) for flag in (False, True)] == [False, True]
    assert [told(flag) for flag in (False, True, False)] == [False, True, False]
    assert not alone.calls


def test_any_of_several_now():
    assert not any_process(Imagined(3), False)
    assert any_process(Imagined(3), True)
    assert any_process(Imagined(3, others=2), False)


def test_any_of_several_a_call_later():
    several = Imagined(2)
    told = AnyProcessBefore(several)
    assert [told(flag) for flag in (False, True, False, False)] == [False, False, True, False]
    several.others = 1
    assert [told(False), told(False)] == [False, True]
    assert several.calls == 6
