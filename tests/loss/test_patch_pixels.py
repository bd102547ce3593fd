import pytest
import torch

from semivim.loss.patch_pixels import denormalise_patches, normalise_patches, patch_loss, patchify, unpatchify


def naive_targets(images, p):
    """Normalised patches by loops over patches and pixels, in float64."""
    result = []
    for image in images.double():
        c, h, w = image.shape
        patches = []
        for top in range(0, h, p):
            for left in range(0, w, p):
                values = [image[k, top + i, left + j] for i in range(p) for j in range(p) for k in range(c)]
                x = torch.stack(values)
                mean = x.sum() / len(x)
                var = ((x - mean) ** 2).sum() / (len(x) - 1)
                patches.append((x - mean) / torch.sqrt(var + 1e-6))
        result.append(torch.stack(patches))
    return torch.stack(result)


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_those_of_a_loop_over_patches(channels):
    images = torch.randn(2, channels, 8, 12)
    actual = normalise_patches(patchify(images, 4))
    assert actual.shape == (2, 6, 16 * channels)
    torch.testing.assert_close(actual.double(), naive_targets(images, 4), rtol=0, atol=2e-6)
    exact = normalise_patches(patchify(images.double(), 4))
    torch.testing.assert_close(exact, naive_targets(images, 4), rtol=0, atol=1e-12)


def test_patches_go_back_to_where_they_were():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)
    torch.testing.assert_close(denormalise_patches(normalise_patches(patches), patches), patches, rtol=0, atol=1e-5)


def test_a_constant_patch_is_zero():
    assert torch.equal(normalise_patches(torch.full((1, 2, 48), 3.5)), torch.zeros(1, 2, 48))
    assert normalise_patches(torch.full((1, 2, 48), 3.7)).abs().max() < 1e-3  # whose mean is rounded


def test_predicting_zero_costs_p_minus_one_over_p_on_photographs():
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
    crops = [torch.from_numpy(photo[:192, left : left + 192].copy()) for photo in photos for left in (0, 192, 384)]
    images = torch.stack(crops).permute(0, 3, 1, 2).float() / 255
    mean_square = normalise_patches(patchify((images - 0.45) / 0.225, 16)).square().mean()
    assert abs(mean_square - 0.9987) < 5e-4


def test_loss_is_a_mean_over_all_values_and_its_gradient_the_difference():
    prediction, target = torch.randn(2, 6, 12, requires_grad=True), torch.randn(2, 6, 12)
    loss = patch_loss(prediction, target)
    rows = zip(prediction.detach().double().flatten(0, 1), target.double().flatten(0, 1), strict=True)
    naive = sum(((a - b) ** 2).sum() for a, b in rows) / (2 * 6 * 12)
    torch.testing.assert_close(loss.double(), naive, rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - target) / target.numel())


def test_noise_on_one_token_costs_what_it_should():
    prediction, target, noise = torch.randn(2, 6, 12), torch.randn(2, 6, 12), torch.randn(12)
    noisy = prediction.clone()
    noisy[1, 4] += noise
    extra = (noise.square() + 2 * noise * (prediction - target)[1, 4]).sum() / target.numel()
    torch.testing.assert_close(patch_loss(noisy, target) - patch_loss(prediction, target), extra, rtol=1e-4, atol=1e-6)


def test_a_prediction_in_bfloat16_is_compared_in_float32():
    prediction, target = torch.randn(1, 2, 12).bfloat16(), torch.randn(1, 2, 12)
    assert patch_loss(prediction, target).dtype == torch.float32
