import pytest
import torch

from semivim.layers import token_router
from semivim.layers.token_router import (
    RoutedTokens,
    TokenRouter,
    class_token,
    keep_best,
    keep_drawn,
    kept_patches,
    patch_tokens,
    policy_of,
    restore_grid,
    straight_through,
)
from tests.tolerance import assert_close


def numbered(b=1, m=6):
    """Tokens whose value says where they are: patch i of image j is 100 j + i, class tokens are -1 and below."""
    patches = torch.arange(m, dtype=torch.float32).expand(b, -1) + 100 * torch.arange(b)[:, None]
    cls = -1 - torch.arange(b, dtype=torch.float32)[:, None]
    return RoutedTokens(torch.cat([patches[:, : m // 2], cls, patches[:, m // 2 :]], 1)[..., None])


def prefer(*images):
    """Scores that keep the patches listed for each image."""
    p = 1 + max(max(image, default=0) for image in images)
    scores = torch.full((len(images), max(p, 6), 2), 0.0)
    for i, image in enumerate(images):
        scores[i, image, 0] = 1e3
        scores[i, [j for j in range(scores.shape[1]) if j not in image], 1] = 1e3
    return scores


def values(tokens):
    return tokens.x[..., 0].tolist()


def test_the_best_stay_in_their_order_around_the_class_token():
    scores = torch.tensor([[5.0, 1.0, 4.0, 0.0, 3.0, 9.0], [0.0, 9.0, 1.0, 8.0, 2.0, 7.0]])
    tokens = keep_best(numbered(2), torch.stack([scores, -scores], -1), 0.5)
    assert values(tokens) == [[0, -1, 2, 5], [101, -2, 103, 105]]
    assert kept_patches(tokens).tolist() == [[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1]]
    # The share is of the whole grid: 0.34 of six patches, not of three.
    again = keep_best(tokens, torch.stack([scores[:, :3], -scores[:, :3]], -1), 0.34)
    assert values(again) == [[0, -1, 5], [103, -2, 105]]
    assert kept_patches(again).tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 1]]


def test_dropped_patches_are_put_back_as_they_were_when_they_left():
    tokens = keep_best(numbered(), prefer([0, 2, 3, 5]), 0.67)
    tokens = keep_best(tokens._replace(x=tokens.x + 0.5), prefer([1, 3])[:, :4], 0.34)
    tokens = tokens._replace(x=tokens.x + 0.25)
    assert restore_grid(tokens)[0, :, 0].tolist() == [0.5, 1, 2.75, -0.25, 3.5, 4, 5.75]
    assert torch.equal(restore_grid(numbered(2)), numbered(2).x)


def test_drawn_patches_lead_and_the_class_token_is_in_their_middle(monkeypatch):
    monkeypatch.setattr(token_router, "gumbel_like", torch.zeros_like)
    tokens = keep_drawn(numbered(3), prefer([1, 4, 5], [], [0, 1, 2, 3, 4, 5]))
    assert values(tokens) == [
        [1, -1, 4, 5, 0, 2, 3],
        [-2, 100, 101, 102, 103, 104, 105],
        numbered(3).x[2, :, 0].tolist(),
    ]
    assert tokens.mask[..., 0].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1] * 7]
    assert class_token(tokens.x, tokens.slot)[..., 0].tolist() == [[-1], [-2], [-3]]
    assert patch_tokens(tokens)[0, :, 0].tolist() == [1, 4, 5, 0, 2, 3]
    assert policy_of(tokens)[0, :, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert kept_patches(tokens).tolist() == [[0, 1, 0, 0, 1, 1], [0] * 6, [1] * 6]
    # A patch once dropped stays so, whatever its score; scores come in the new order.
    again = keep_drawn(tokens, prefer([0, 2, 3, 4], [0, 1], [1]))
    assert values(again)[0] == [1, -1, 5, 4, 0, 2, 3]
    assert kept_patches(again).tolist() == [[0, 1, 0, 0, 0, 1], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert torch.equal(restore_grid(again), numbered(3).x)


def test_draws_follow_the_probabilities_and_carry_their_gradient():
    torch.manual_seed(0)
    logits = torch.tensor([0.75, 0.25]).log().expand(400, 6, 2).clone().requires_grad_()
    kept = kept_patches(keep_drawn(numbered(400), logits.log_softmax(-1)))
    assert abs(kept.mean() - 0.75) < 0.03
    kept.sum().backward()
    assert logits.grad[..., 0].gt(0).all() and logits.grad[..., 1].lt(0).all()


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.tensor([0.2, 0.9], requires_grad=True)
    y = straight_through(torch.tensor([0.0, 1.0]), soft)
    (y * torch.tensor([3.0, 4.0])).sum().backward()
    assert y.tolist() == [0, 1] and soft.grad.tolist() == [3, 4]


def test_scores_see_a_patch_and_the_mean_of_the_kept_ones():
    torch.manual_seed(0)
    router, x = TokenRouter(16, 0.5), torch.randn(2, 9, 16)
    torch.nn.init.normal_(router.in_conv[1].weight)
    torch.nn.init.normal_(router.out_conv[0].weight)
    kept = torch.tensor([1.0] * 5 + [0.0] * 4).view(1, 9, 1).expand(2, -1, -1)
    with torch.no_grad():
        u = router.in_conv(x)
        mean = u[:, :5, 8:].sum(1, keepdim=True) / 6
        assert_close(
            "scores", router.score(x, kept), router.out_conv(torch.cat([u[..., :8], mean.expand(2, 9, 8)], -1))
        )
        assert_close("all kept", router.score(x, None), router.score(x, torch.ones_like(kept)))
        assert not torch.equal(router.score(x, kept), router.score(x, None))
        assert_close("probabilities", router.score(x, kept).exp().sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("training", [True, False])
def test_a_ratio_of_one_leaves_the_router_out_of_evaluation(training):
    router, tokens = TokenRouter(16, 1.0).train(training), RoutedTokens(torch.randn(1, 5, 16))
    assert (router(tokens) is tokens) != training


def test_initial_weights_are_the_releases():
    router = TokenRouter(64, 0.5)
    for _ in range(2):
        for module in (router.in_conv[1], router.out_conv[0], router.out_conv[2], router.out_conv[4]):
            assert not module.bias.any() and 0.01 < module.weight.std() < 0.03
        torch.nn.init.ones_(router.out_conv[4].bias)
        router.reset_parameters()
