import torch

from semivim.ops.cuda_call import Context, unavailable


def test_a_context_hands_on_what_it_is_given():
    context, x = Context(), torch.ones(2)
    context.save_for_backward(x, None)
    assert context.saved_tensors[0] is x and context.saved_tensors[1] is None


def test_a_device_without_cuda_is_named():
    assert unavailable(torch.device("cpu")) == "needs a CUDA device, got cpu"
    assert unavailable(torch.device("cuda", 1)) is None
