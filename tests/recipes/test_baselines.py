import json

import torch
import torch.nn.functional as F

from recipes.baselines import LogisticRegression, report
from tests.recipes.classification_runs import quiet_trainer


def draw(number=60):
    labels = torch.arange(number) % 3
    x = torch.randn(number, 4) * torch.tensor([1.0, 100.0, 0.01, 1.0])
    x[:, 0] += 2 * labels
    x[:, 3] = 7
    return x, labels


def test_the_regression_is_at_the_minimum_of_its_loss():
    x, labels = draw()
    weights = torch.tensor([1.0, 2.0, 3.0])
    head = LogisticRegression(x, labels, num_classes=3, l2=0.01, class_weights=weights)
    z = (x[:, :3].double() - x[:, :3].double().mean(0)) / x[:, :3].double().std(0, correction=0)
    w = head.linear.weight[:, :3].detach().requires_grad_()
    b = head.linear.bias.detach().requires_grad_()
    loss = F.cross_entropy(z @ w.T + b, labels, weight=weights.double()) + 0.01 * w.square().sum()
    gradients = torch.autograd.grad(loss, (w, b))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    torch.testing.assert_close(head(x), (z @ w.T + b).float().detach())


def test_a_channel_that_never_varies_changes_nothing():
    x, labels = draw()
    head = LogisticRegression(x, labels, num_classes=3, l2=0.01)
    other = x.clone()
    other[:, 3] = 1e6
    assert torch.equal(head(x), head(other))


def test_the_regression_fits_inside_an_evaluation():
    with torch.inference_mode():
        x, labels = draw()
        head = LogisticRegression(x, labels, num_classes=3, l2=0.001)
        assert (head(x).argmax(1) == labels).float().mean() > 0.6


def test_the_report_prints_and_keeps_the_figures(tmp_path, capsys):
    trainer = quiet_trainer(tmp_path)
    (tmp_path / "metrics.json").write_text('{"metrics": {"steps": 3}}')
    figures = {"accuracy": 0.75, "balanced_accuracy": 0.5, "auroc": 0.625, "loss": 1.0}
    report(trainer, {"this run": figures, "mean": {"accuracy": 0.25}}, split="val", num_classes=4)
    report(trainer, {"this run": figures}, split="test", num_classes=4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val", "accuracy", "balanced_accuracy", "auroc"] in lines
    assert ["this", "run", "0.750", "0.500", "0.625"] in lines
    assert ["mean", "0.250", "nan", "nan"] in lines
    assert ["chance", "0.250"] in lines
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["metrics"] == {"steps": 3}
    saved = saved["comparison"]
    assert saved["val"]["mean"] == {"accuracy": 0.25}
    assert saved["test"]["this run"] == figures
