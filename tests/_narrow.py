"""Gradients of features under bfloat16 autocast, for images whose coarsest map is one cell wide."""

import torch


def check_gradients_of_narrow_images(adapter, width):
    """What backbone and neck learn from images of this width, in bfloat16, is near what they learn in float32.

    The bfloat16 gradient of a strided convolution is uninitialised memory on some CPUs where its map is one cell wide.
    """
    image = torch.rand(3, 96, width, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[2.0, 4.0, 30.0, 90.0]]), "labels": torch.tensor([1])}
    batch = adapter.prepare([image, image], [target] * 2)
    assert batch.images.shape[-1] == width

    def gradients(enabled):
        adapter.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = adapter.features(batch)
        sum((x.float() * (1 + x.detach().float().sign())).sum() for x in features).backward()
        return {name: p.grad.clone() for name, p in adapter.model.named_parameters() if p.grad is not None}

    exact = gradients(False)
    # What was in uninitialised memory is large here.
    stale = [torch.full((count,), 1e20) for count in (64, 1024, 2304, 4096, 9216, 36864)]
    del stale
    for name, got in gradients(True).items():
        assert got.norm() < 2 * exact[name].norm() + 0.1, name
