import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kdtoolkit.contract import Batch
from kdtoolkit.detectors.assign import ATSSAssigner, inside_padded
from kdtoolkit.detectors.dense import square_anchors

STRIDES = (8, 16, 32)
GRID = ((8, 10), (4, 5), (2, 3))
CLASSES = 4


def priors_of(grid=GRID):
    return square_anchors(grid, STRIDES, 8.0, torch.device("cpu"))


def batch_of(counts, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 50
        boxes.append(torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 40 + 4], 1))
        labels.append(torch.randint(0, CLASSES, (count,), generator=generator))
    images = torch.zeros(len(counts), 3, 64, 80)
    return Batch(images, padded, padded, padded, tuple(boxes), tuple(labels))


def assigned_by_loops(boxes, labels, padded, topk):
    """One image, box by box: labels and boxes of all anchors, and how near to a tie the closest decision was."""
    anchors = priors_of().boxes.double()
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    valid = [bool(x < padded[1] and y < padded[0]) for x, y in centre]
    found, best = [CLASSES] * len(anchors), [-1.0] * len(anchors)
    targets, margin = torch.zeros(len(anchors), 4), 1.0
    for box, label in zip(boxes.double(), labels, strict=True):
        iou = box_iou(box[None], anchors)[0]
        middle = (box[:2] + box[2:]) / 2
        candidates, start = [], 0
        for height, width in GRID:
            level = [i for i in range(start, start + height * width) if valid[i]]
            candidates += sorted(level, key=lambda i: float((centre[i] - middle).norm()))[:topk]
            start += height * width
        threshold = iou[candidates].mean() + iou[candidates].std()
        for i in candidates:
            margin = min(margin, abs(float(iou[i] - threshold)))
            x, y = centre[i]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou[i] >= threshold and inside and iou[i] > best[i]:
                margin = min(margin, abs(float(iou[i]) - best[i]))
                found[i], best[i], targets[i] = int(label), float(iou[i]), box.float()
    return torch.tensor(found), targets, valid, margin


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    topk=st.sampled_from([3, 9]),
    data=st.data(),
)
def test_agrees_with_a_loop_over_images_and_boxes(counts, seed, topk, data):
    padded = tuple((data.draw(st.sampled_from([32, 64])), data.draw(st.sampled_from([32, 64, 80]))) for _ in counts)
    batch = batch_of(counts, seed, padded)
    assignment = ATSSAssigner(topk)(priors_of(), batch, CLASSES)
    normaliser = 0
    for i in range(len(counts)):
        labels, boxes, valid, margin = assigned_by_loops(batch.boxes[i], batch.labels[i], padded[i], topk)
        assume(margin > 1e-5)  # float32 may decide a tie otherwise
        positive = labels < CLASSES
        assert assignment.labels[i].tolist() == labels.tolist()
        assert torch.equal(assignment.boxes[i][positive], boxes[positive])
        assert assignment.weights[i].bool().tolist() == valid
        normaliser += max(int(positive.sum()), 1)
    assert assignment.normaliser.item() == normaliser
    assert torch.equal(assignment.positive, assignment.labels < CLASSES)


def test_without_any_box_all_is_background():
    assignment = ATSSAssigner()(priors_of(), batch_of([0, 0], 0, ((64, 80), (64, 80))), CLASSES)
    assert (assignment.labels == CLASSES).all()
    assert assignment.normaliser.item() == 2


def test_an_object_finds_priors():
    assignment = ATSSAssigner()(priors_of(), batch_of([1], 3, ((64, 80),)), CLASSES)
    assert assignment.positive.any()


def test_cells_beyond_an_images_own_padding_are_outside():
    batch = batch_of([0], 0, ((32, 64),))
    inside = inside_padded(priors_of(), batch)[0]
    finest = inside[: 8 * 10].view(8, 10)
    assert finest[:4, :8].all()
    assert int(finest.sum()) == 32
    assert inside[80:100].view(4, 5).sum() == 2 * 4
