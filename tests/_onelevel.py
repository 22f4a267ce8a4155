"""A detector library as small as can be. docs/own_detector.md writes an adapter for it."""

import torch
from torch import nn
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

STRIDE = 8


class OneLevel(nn.Module):
    """Predicts at each cell of one level: class logits, and the distances to the four sides of a box."""

    def __init__(self, num_classes, channels=16):
        super().__init__()
        self.num_classes = num_classes
        self.channels = channels
        layers = [nn.Conv2d(3, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 2, 1)]
        layers += [nn.Conv2d(channels, channels, 3, 2, 1)]
        self.backbone = nn.Sequential(*(layer for conv in layers for layer in (conv, nn.ReLU())))
        self.classify = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.locate = nn.Conv2d(channels, 4, 3, padding=1)

    def head(self, feature):
        """(N, C, H, W) -> logits (N, H * W, K) and log distances in cells (N, H * W, 4)."""
        return tuple(conv(feature).flatten(2).mT for conv in (self.classify, self.locate))

    def points(self, feature):
        """The cells' centres (H * W, 2) in pixels."""
        height, width = feature.shape[2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return (torch.stack([x, y], -1).flatten(0, 1).to(feature.device) + 0.5) * STRIDE

    def decode(self, distances, points):
        """Boxes (N, A, 4) xyxy in pixels."""
        left_top, right_bottom = (distances.exp() * STRIDE).chunk(2, -1)
        return torch.cat([points - left_top, points + right_bottom], -1)

    def match(self, points, boxes, labels):
        """For each point the label and the box of the first object it lies in; the label K for none."""
        inside = ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(-1)
        if not len(boxes):
            return torch.full((len(points),), self.num_classes, device=points.device), points.new_zeros(len(points), 4)
        first = inside.int().argmax(1)
        return torch.where(inside.any(1), labels[first], self.num_classes), boxes[first]

    def compute_loss(self, logits, boxes, labels, matched, avg_factor):
        """Both loss terms, of logits (N, A, K), boxes (N, A, 4) and what `match` found for each image."""
        target = nn.functional.one_hot(labels, self.num_classes + 1)[..., :-1].float()
        positive = labels < self.num_classes
        return {
            "cls": sigmoid_focal_loss(logits, target, reduction="sum") / avg_factor,
            "box": generalized_box_iou_loss(boxes[positive], matched[positive], reduction="sum") / avg_factor,
        }

    def select(self, scores, boxes, size):
        """Detections of one image of a (height, width): the best 100 after non-maximum suppression."""
        rows, labels = (scores > 0.05).nonzero(as_tuple=True)
        boxes, scores = clip_boxes_to_image(boxes[rows], size), scores[rows, labels]
        kept = batched_nms(boxes, scores, labels, 0.6)[:100]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}

    def collate(self, images):
        """Normalised images, padded with 0 to one size."""
        height, width = (max(-(-image.shape[side] // STRIDE) * STRIDE for image in images) for side in (1, 2))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image - 0.5) / 0.25
        return batch

    def predict(self, images):
        """The library's own inference."""
        feature = self.backbone(self.collate(images))
        logits, distances = self.head(feature)
        boxes = self.decode(distances, self.points(feature))
        sizes = [image.shape[1:] for image in images]
        return [self.select(*each) for each in zip(logits.sigmoid(), boxes, sizes, strict=True)]

    def loss(self, images, targets):
        """The library's own training losses."""
        feature = self.backbone(self.collate(images))
        logits, distances = self.head(feature)
        points = self.points(feature)
        found = [self.match(points, target["boxes"], target["labels"]) for target in targets]
        labels, matched = (torch.stack(each) for each in zip(*found, strict=True))
        count = (labels < self.num_classes).sum().clamp(min=1)
        return self.compute_loss(logits, self.decode(distances, points), labels, matched, count)
