import pytest
import timm
import torch
from torch.func import functional_call, grad
from torch.utils.flop_counter import FlopCounterMode

from semivim.ops.eager import is_eager


def test_a_plain_tensor_is_run():
    assert is_eager(torch.ones(2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert is_eager(torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_looks_at_operations_is_noticed():
    seen = []

    def note(x):
        seen.append(is_eager(x))
        return x.sum()

    with FlopCounterMode(display=False):
        note(torch.ones(2))
    with torch.device("cpu"):  # a mode of functions
        note(torch.ones(2))
    grad(note)(torch.ones(2))
    torch.vmap(note)(torch.ones(2, 2))
    torch.jit.trace(note, torch.ones(2), check_trace=False)
    note(torch.nn.Parameter(torch.ones(2)))
    note(torch.ones(2, device="meta"))
    assert seen == [False] * 7


def test_a_compiled_program_does_not_take_the_direct_path():
    compiled = torch.compile(lambda x: x + int(is_eager(x)), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 0


def test_functional_calls_of_a_model_take_the_direct_path_and_agree():
    model = timm.create_model("test_vim", depth=1, num_classes=3)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 32, 32)
    y = functional_call(model, doubled, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(y, model(x))
