"""Preference losses as their papers print them, in plain arithmetic: what the trainers are held against.

Written from the papers, in their names: `pi` and `ref` are log-probabilities of whole answers under the policy and
the reference, `w` the preferred answer and `l` the other one, `n` an answer's tokens. One pair at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """What the losses see of a pair."""

    pi_w: float
    pi_l: float
    ref_w: float
    ref_l: float
    n_w: int
    n_l: int


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo(pair: Pair, beta: float) -> float:
    """Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return -math.log(sigma(beta * (pair.pi_w - pair.ref_w) - beta * (pair.pi_l - pair.ref_l)))


def ipo(pair: Pair, tau: float) -> float:
    """Azar et al. 2023, arXiv 2310.12036, equation 17: (h - 1 / (2 tau)) squared.

    `h` is the log of pi(w) ref(l) / (pi(l) ref(w)). Here as the authors ran it, by what they told TRL's: with the mean
    per token for the log-probability of an answer.
    """
    h = (pair.pi_w - pair.ref_w) / pair.n_w - (pair.pi_l - pair.ref_l) / pair.n_l
    return (h - 1 / (2 * tau)) ** 2


def robust(pair: Pair, beta: float, eps: float) -> float:
    """Chowdhury et al. 2024, arXiv 2403.00409, section 3.1: the loss that lemma 3.1 shows to be unbiased.

    With `eps` the probability that w and l were exchanged: ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps).
    """
    exchanged = Pair(pair.pi_l, pair.pi_w, pair.ref_l, pair.ref_w, pair.n_l, pair.n_w)
    return ((1 - eps) * dpo(pair, beta) - eps * dpo(exchanged, beta)) / (1 - 2 * eps)


def hinge(pair: Pair, gamma: float) -> float:
    """Liu et al. 2023, arXiv 2309.06657, the hinge-norm loss of section 3.3: SLiC's with a reference."""
    return max(0.0, 1 - (gamma * (pair.pi_w - pair.ref_w) - gamma * (pair.pi_l - pair.ref_l)))


def apo_zero(pair: Pair, beta: float) -> float:
    """D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7: - sigma(r(w)) + sigma(r(l)), r = beta log(pi / ref)."""
    return -sigma(beta * (pair.pi_w - pair.ref_w)) + sigma(beta * (pair.pi_l - pair.ref_l))


def sigmoid_norm(pair: Pair, beta: float) -> float:
    """Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, the length-normalised DPO of section 5.1."""
    return -math.log(sigma(beta / pair.n_w * (pair.pi_w - pair.ref_w) - beta / pair.n_l * (pair.pi_l - pair.ref_l)))


def simpo(pair: Pair, beta: float, gamma: float) -> float:
    """Meng et al. 2024, arXiv 2405.14734, equation 6."""
    return -math.log(sigma(beta / pair.n_w * pair.pi_w - beta / pair.n_l * pair.pi_l - gamma))


def orpo(pair: Pair, lam: float) -> float:
    """Hong et al. 2024, arXiv 2403.07691, equation 6, with the odds ratio loss of equation 7."""
    p_w, p_l = math.exp(pair.pi_w / pair.n_w), math.exp(pair.pi_l / pair.n_l)  # Equation 3.
    odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)  # Equation 4.
    l_sft, l_or = -pair.pi_w / pair.n_w, -math.log(sigma(math.log(odds_w / odds_l)))
    return l_sft + lam * l_or


def sft(pair: Pair) -> float:
    """Pang et al. 2024 (iterative RPO), arXiv 2404.19733, the NLL term of equation 1."""
    return -pair.pi_w / pair.n_w


@dataclass(frozen=True)
class Thumb:
    """What KTO sees of an answer."""

    pi: float
    ref: float
    is_desirable: bool


def kto(thumb: Thumb, z0: float, beta: float, lambda_d: float, lambda_u: float) -> float:
    """Ethayarajh et al. 2024, arXiv 2402.01306, equation 7: lambda_y - v(x, y).

    `z0` is the reference point, the divergence of the policy from the reference, estimated and never below 0.
    """
    r = thumb.pi - thumb.ref
    if thumb.is_desirable:
        return lambda_d - lambda_d * sigma(beta * (r - z0))
    return lambda_u - lambda_u * sigma(beta * (z0 - r))


PAIRED: Mapping[str, Callable[[Pair, float], float]] = {
    "sigmoid": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "apo_zero": apo_zero,
    "sigmoid_norm": sigmoid_norm,
    "orpo": orpo,
}
"""Those that have one number besides the pair."""
