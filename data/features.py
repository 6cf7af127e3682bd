"""Train the shipped classifier of garments anew: python data/features.py (three minutes on one core).

It replaces data/checkpoints/fashion_features.safetensors, whose checksum in SHA256SUMS is then to be renewed; another
processor may give other weights.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm.auto import tqdm

from gudlib import data, metrics
from gudlib.data import scale
from gudlib.files import write_tensors


def train_classifier(
    images: UInt8[Tensor, "n 1 28 28"], labels: Int64[Tensor, " n"], epochs: int, seed: int = 0, progress: bool = True
) -> metrics.Classifier:
    """Train a `Classifier` from scratch, on shifted and mirrored images."""
    torch.manual_seed(seed)
    net, batch = metrics.Classifier(), 100
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", disable=not progress):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images))
        chosen = order[(step * batch) % len(images) :][:batch]
        dy, dx = torch.randint(0, 5, (2,)).tolist()
        x = pad(scale(images[chosen]), (2, 2, 2, 2), value=-1.0)[..., dy : dy + 28, dx : dx + 28]
        x = x.flip(-1) if step % 2 else x
        loss = cross_entropy(net.head(net(x)), labels[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def accuracy(classifier: metrics.Classifier, images: UInt8[Tensor, "n 1 28 28"], labels: Int64[Tensor, " n"]) -> float:
    """Share of images that are classified rightly."""
    with torch.no_grad():
        return float((classifier.head(metrics.embed(scale(images), classifier)).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    train, test = (data.load("fashion_mnist", split) for split in ("train", "test"))
    classifier = train_classifier(train.images, train.labels, epochs=14)
    share = accuracy(classifier, test.images, test.labels)
    write_tensors(metrics.SHIPPED, classifier.half().state_dict(), {"accuracy": round(share, 4)})
    print(f"{share:.1%} of the test images are classified rightly")
