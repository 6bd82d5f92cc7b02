"""timm's own functions, as its train.py uses them: layer-wise learning rates, schedule, mixup, EMA and meters."""

import timm
import torch
from sklearn.datasets import load_digits
from timm import loss, optim, scheduler, utils
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import masksurgery

x = interpolate(torch.tensor(load_digits().images)[:, None].float() / 16, size=24, mode="bilinear")  # [1797, 1, 24, 24]
y = torch.tensor(load_digits().target)
train_loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True, drop_last=True)
test_loader = DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=128)


def train(model: torch.nn.Module, epochs: int) -> torch.nn.Module:
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.9)
    schedule, _ = scheduler.create_scheduler_v2(optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-3)
    mixup, criterion = timm.data.Mixup(0.1, num_classes=10, label_smoothing=0.0), loss.SoftTargetCrossEntropy()
    ema = utils.ModelEmaV3(model, decay=0.95)
    model.train()
    for epoch in range(epochs):
        for images, labels in train_loader:
            images, targets = mixup(images, labels)
            criterion(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        schedule.step(epoch + 1)
    return ema.module


@torch.no_grad()
def validate(model: torch.nn.Module) -> dict[str, float]:
    losses, top1 = utils.AverageMeter(), utils.AverageMeter()
    for images, labels in test_loader:
        logits = model.eval()(images)
        losses.update(cross_entropy(logits, labels).item(), len(labels))
        top1.update(utils.accuracy(logits, labels)[0].item(), len(labels))
    print(f"accuracy {top1.avg:.1f}%, NLL {losses.avg:.3f}")
    return {"accuracy": top1.avg, "nll": losses.avg}


def main() -> dict[str, dict[str, float]]:
    utils.random_seed(0)  # of torch and of numpy, which draws the mixtures
    base = train(timm.create_model("test_resnet", in_chans=1, num_classes=10), epochs=4)
    before = validate(base)
    model = train(masksurgery.convert(base, n=4, scale=2.0, example_inputs=(x[:1],)), epochs=12)
    model.output = "logits"  # what eval returns, so that validate stays as it is
    after = validate(model)
    model.output = "mutual_information"  # how far the members disagree
    digits, noise = (model(images).mean().item() for images in (x[1200:], torch.rand(200, 1, 24, 24)))
    print(f"mutual information of digits {digits:.2f}, of noise {noise:.2f}")
    return {"base": before, "ensemble": after, "disagreement": {"digits": digits, "noise": noise}}


if __name__ == "__main__":
    main()
