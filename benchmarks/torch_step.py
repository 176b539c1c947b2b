"""PyTorch's side of train_step.py, in an environment of its own."""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

# timm only imports torchvision.
for part in ("", ".ops", ".ops.misc", ".datasets", ".transforms"):
    sys.modules["torchvision" + part] = MagicMock()
sys.modules["torchvision.transforms.functional"] = MagicMock()
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

SCALE, K, RHO, DECAY = 17.0, 0.7, 0.05, 0.9997
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Classifier(torch.nn.Module):
    """timm's backbone and the cosine head, under the names of our export."""

    def __init__(self, name: str, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0)
        self.has_hidden = "act2.weight" in weights  # MobileNetV3's conv_head
        self.act2 = torch.nn.PReLU()
        self.weight = torch.nn.Parameter(weights.pop("classifier.weight"))
        if self.has_hidden:
            self.act2.weight.data = weights.pop("act2.weight")
        self.backbone.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone.forward_features(x).mean((2, 3))
        if self.has_hidden:
            x = self.act2(self.backbone.conv_head(x[:, :, None, None])[:, :, 0, 0])
        x, weight = F.normalize(x.float()), F.normalize(self.weight, dim=0)
        return (x @ weight).clamp(-1, 1)


def aam(cosines: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    positive = K / SCALE * t * F.logsigmoid(SCALE * cosines)
    negative = (1 - K) / SCALE * (1 - t) * F.logsigmoid(-SCALE * cosines)
    return -(positive + negative).sum()


class Training:
    """A model in one memory format with SAM, SGD and EMA."""

    def __init__(self, args, folder: Path, layout: torch.memory_format):
        arrays = np.load(folder / "weights.npz")
        weights = {name: torch.tensor(arrays[name]) for name in arrays.files}
        model = Classifier(args.backbone, weights).to(DEVICE, memory_format=layout)
        self.average = copy.deepcopy(model)
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
        flat = [p for p in others if p.ndim == 1]
        self.params = list(model.parameters())
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 5e-4},
            {"params": flat, "weight_decay": 0},
            {"params": biases, "weight_decay": 0, "lr": 2e-4},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, fused=True)
        self.half = args.dtype == "bfloat16"
        batch = np.load(folder / "batch.npz")
        self.images = torch.tensor(batch["image"], device=DEVICE)
        self.labels = torch.tensor(batch["labels"], device=DEVICE).float()
        self.layout, self.model = layout, model
        self.call = torch.compile(model) if CUDA else model
        self.kept, self.new = (
            [x for x in network.state_dict().values() if x.is_floating_point()]
            for network in (self.average, model)
        )

    def loss(self) -> torch.Tensor:
        x = self.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.contiguous(memory_format=self.layout)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            cosines = self.call(x)
        return aam(cosines.float(), self.labels)

    def step(self) -> float:
        self.loss().backward()
        with torch.no_grad():
            grads = [p.grad for p in self.params]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            ascent = torch._foreach_mul(grads, RHO / (norm + 1e-12))
            torch._foreach_add_(self.params, ascent)
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(self.params, ascent)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.kept, self.new, 1 - DECAY)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    parser.add_argument("--backbone")
    parser.add_argument("--dtype")
    for name in ("size", "batch", "classes"):
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    folder = Path(args.worker)
    layouts = {"channels_last": torch.channels_last}
    if not CUDA:
        layouts["contiguous"] = torch.contiguous_format
    trainings = {
        name: Training(args, folder, layout) for name, layout in layouts.items()
    }
    first = trainings["channels_last"].loss().item()
    for training in trainings.values():
        training.step()
        training.step()
    about = {
        "loss": first,
        "variants": list(trainings),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        asked, ms = json.loads(line), []
        for _ in range(asked["steps"]):
            begun = time.perf_counter()
            trainings[asked["variant"]].step()
            ms.append(1e3 * (time.perf_counter() - begun))
        print(json.dumps({"ms": ms}), flush=True)


if __name__ == "__main__":
    main()
