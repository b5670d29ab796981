"""Plain PyTorch: the penalty in a training loop, then a certified interval of the trained network."""

import torch
from sklearn.datasets import load_digits

from lightning_lip import LipschitzRegularizer, certify


def main():
    """Train a digits classifier under a budget of 20 on the bound over its graph."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 10),
    )
    regularizer = LipschitzRegularizer(net, 0.1, "hinge_log", target=20.0, example_input=x[:1])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(15):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            regularizer.add_grad_()
            optimizer.step()
    net.eval()
    accuracy = (net(x[test]).argmax(1) == y[test]).float().mean()
    interval = certify(net, x[:1], data=x[test])
    print(f"accuracy {accuracy:.3f}, Lipschitz constant certified in [{interval.lower:.1f}, {interval.upper:.1f}]")


if __name__ == "__main__":
    main()
