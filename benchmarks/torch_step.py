"""PyTorch's side of train_step.py, in an environment of its own."""

import argparse
import copy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
from side_by_side import answer

# timm only imports torchvision.
for part in ("", ".ops", ".ops.misc", ".datasets", ".transforms"):
    sys.modules["torchvision" + part] = MagicMock()
sys.modules["torchvision.transforms.functional"] = MagicMock()
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torch_heads  # noqa: E402

SCALE, K, RHO, DECAY = 17.0, 0.7, 0.05, 0.9997
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
torch.backends.cudnn.benchmark = True  # as timm's own training; XLA tries them out too


class Classifier(torch.nn.Module):
    """timm's backbone and one of our heads, from the tensors of our export."""

    def __init__(self, name: str, weights: dict[str, torch.Tensor], head: str):
        super().__init__()
        backbone = timm.create_model(name, num_classes=0)
        names = backbone.state_dict().keys()
        own = {n: weights[n] for n in weights if n in names}
        conv_head = None
        if hasattr(backbone, "conv_head") and not hasattr(backbone, "bn2"):
            # MobileNetV3's belongs to the linear head.
            conv_head, backbone.conv_head = backbone.conv_head, torch.nn.Identity()
            parts = {n: own.pop(n) for n in list(own) if n.startswith("conv_head.")}
            if parts:
                state = {n.removeprefix("conv_head."): x for n, x in parts.items()}
                conv_head.load_state_dict(state)
        backbone.load_state_dict(own)
        self.backbone = backbone
        rest = {n: x for n, x in weights.items() if n not in names}
        self.head = torch_heads.HEADS[head](rest, conv_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, H, W] -> cosines [batch, classes], float32."""
        return self.head(self.backbone.forward_features(x))


def classifier(
    args: argparse.Namespace,
    folder: Path,
    layout: torch.memory_format,
    head: str = "linear",
) -> Classifier:
    """On the device, with the weights that ours has written."""
    arrays = np.load(folder / weights_file(head))
    weights = {name: torch.tensor(arrays[name]) for name in arrays.files}
    model = Classifier(args.backbone, weights, head)
    return model.to(DEVICE, memory_format=layout)


def weights_file(head: str) -> str:
    return f"weights-{head}.npz"


def aam(cosines: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    positive = K / SCALE * t * F.logsigmoid(SCALE * cosines)
    negative = (1 - K) / SCALE * (1 - t) * F.logsigmoid(-SCALE * cosines)
    return -(positive + negative).sum()


class Training:
    """A model in one memory format with SAM, SGD and EMA."""

    def __init__(
        self, args, folder: Path, layout: torch.memory_format, head: str = "linear"
    ):
        model = classifier(args, folder, layout, head)
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
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if CUDA:
        about["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    answer(about, {name: training.step for name, training in trainings.items()})


if __name__ == "__main__":
    main()
