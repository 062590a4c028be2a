"""Every response of a three-token vocabulary, and the exact gradients of a tabular softmax policy over them.

The policy is a table of logits with one row per prefix, in float64. Expectations are sums over all responses, each
probability a product along the response; autograd differentiates those sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = 3
EOS = 2
MAX_LENGTH = 3

Response = tuple[int, ...]


def responses() -> list[Response]:
    """All responses: those that end in EOS, and those that the length limit cuts."""
    found: list[Response] = []
    unfinished: list[Response] = [()]
    while unfinished:
        prefix = unfinished.pop()
        for token in range(VOCABULARY):
            response = (*prefix, token)
            if token == EOS or len(response) == MAX_LENGTH:
                found.append(response)
            else:
                unfinished.append(response)
    return sorted(found)


def prefixes() -> list[Response]:
    """All prefixes after which the policy has to choose a token: the rows of its table."""
    return sorted({response[:t] for response in responses() for t in range(len(response))})


def log_probability(table: Tensor, response: Response) -> Tensor:
    rows = prefixes()
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(response):
        logits = table[rows.index(response[:t])]
        total = total + logits[token] - torch.log(sum(torch.exp(value) for value in logits))
    return total


def expected_reward(table: Tensor, reward: dict[Response, float]) -> Tensor:
    return sum(torch.exp(log_probability(table, response)) * reward[response] for response in responses())


def exact_kl(table: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) between the two distributions over whole responses."""
    total = torch.zeros((), dtype=torch.float64)
    for response in responses():
        log_p = log_probability(table, response)
        total = total + torch.exp(log_p) * (log_p - log_probability(reference, response))
    return total


def greedy_response(table: Tensor) -> Response:
    rows = prefixes()
    response: Response = ()
    while len(response) < MAX_LENGTH and (not response or response[-1] != EOS):
        response = (*response, int(table[rows.index(response)].argmax()))
    return response


def exact_gradient(table: Tensor, reward: dict[Response, float], reference: Tensor, beta: float) -> Tensor:
    """Gradient of `E[reward] - beta * KL(policy || reference)` with respect to the table."""
    leaf = table.clone().requires_grad_()
    objective = expected_reward(leaf, reward) - beta * exact_kl(leaf, reference)
    (gradient,) = torch.autograd.grad(objective, leaf)
    return gradient
