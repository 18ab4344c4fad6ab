"""Networks that carry compression in their structure or their zeros, for the compression report."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune


class Mixed(nn.Module):
    """One layer of each kind, the large ones above the exporter's folding limits: masks, 2:4, two factors, shared."""

    def __init__(self, width=600):
        super().__init__()
        self.masked = nn.Linear(12, width)
        self.two_of_four = nn.Linear(width, width)
        self.down = nn.Linear(width, 8, bias=False)
        self.up = nn.Linear(8, width)
        self.shared = nn.Linear(width, width)
        self.plain = nn.Linear(width, 5)

    def forward(self, vector):
        hidden = functional.relu(self.masked(vector))
        hidden = functional.relu(self.two_of_four(hidden))
        hidden = functional.relu(self.up(self.down(hidden)))
        hidden = functional.relu(self.shared(functional.relu(self.shared(hidden))))
        return self.plain(hidden)


class Cnn(nn.Module):
    """Convolutions of which the first may have fewer channels."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        hidden = functional.relu(self.body(functional.relu(self.stem(image))))
        return self.head(functional.adaptive_avg_pool2d(hidden, 1).flatten(1))


class Tagger(nn.Module):
    """An LSTM and a linear layer on its last step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 20, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, sequence):
        states, _ = self.lstm(sequence)
        return self.head(states[:, -1])


def mixed():
    torch.manual_seed(0)
    module = Mixed()
    prune.l1_unstructured(module.masked, "weight", 0.7)
    groups = module.two_of_four.weight.detach().reshape(-1, 4)
    smallest = groups.abs().argsort(1)[:, :2]
    mask = torch.ones_like(groups).scatter_(1, smallest, 0.0).reshape(module.two_of_four.weight.shape)
    prune.custom_from_mask(module.two_of_four, "weight", mask)
    return module


def dense_cnn():
    torch.manual_seed(0)
    return Cnn(32)


def pruned_cnn():
    torch.manual_seed(0)
    return Cnn(13)


def tagger():
    torch.manual_seed(0)
    return Tagger()
