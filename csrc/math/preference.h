// Preference losses as functions of the scores x (chosen) and y (rejected) of a pair, or of one score and its label: value and slopes,
// once for host and device. A score is the log-ratio to the reference (the log-prob where there is none), divided by the number of tokens
// where the loss says so, then transformed. Everything is fp64: there are two scores a pair, and thousands of tokens behind them.
//
//   z = beta (x - y) - target - margin, sp(z) = log(1 + e^z), s = logistic function
//   logistic   first sp(-z) + second sp(z)                            DPO, cDPO, robust, SimPO, CPO, ...
//   square     (x - y - 1 / (2 beta))^2                               IPO
//   hinge      max(0, first - z)                                      SLiC, RSO
//   exo        KL((s(z), s(-z)) || (1 - first, first))
//   nca        sp(-bx) + sp(bx) / 2 + sp(by) / 2                      bx = beta x, by = beta y
//   bco        sp(target - bx) + sp(by - target)
//   sppo       (x - 1 / (2 beta))^2 + (y + 1 / (2 beta))^2
//   apo_zero   s(-bx) + s(by)
//   apo_down   s(bx) + s(by - bx)
//   discopop   s(-z / first) sp(-z) + s(z / first) e^-z
//   orpo       beta sp(-log odds ratio) of e^x and e^y
//   none       0 (what is left is the term below)
// and to each: nll * (-log-prob of the chosen, a token).
#pragma once
#include "exp.h"

namespace fa::math {

enum class Pair { logistic, square, hinge, exo, nca, bco, sppo, apo_zero, apo_down, discopop, orpo, none };
enum class Transform { identity, power, js };  // power: (e^(c x) - 1) / c; js: log 2 + log s(x)

struct Formula {
  Pair pair;
  double beta, first, second, target, nll;
  Transform transform;
  double power;
  bool per_token;
};

struct PairLoss {
  double loss, dx, dy;
};
struct Scored {
  double value, slope;
};

constexpr double kCertain = 1.1641532182693481e-10;  // 2^-33: a mean log-prob above minus this counts as this (orpo)
constexpr double kHighest = 80.0;                    // exponents above it are cut (power)

FA_MATH double logistic(double x) {
  const double e = ::exp(x < 0 ? x : -x);
  return x < 0 ? e / (1.0 + e) : 1.0 / (1.0 + e);
}
FA_MATH double softplus(double x) { return (x < 0 ? 0.0 : x) + ::log1p(::exp(x < 0 ? x : -x)); }

FA_MATH Scored transform(const Formula& f, double x) {
  if (f.transform == Transform::js) return {0.69314718055994531 - softplus(-x), logistic(-x)};
  if (f.transform == Transform::identity) return {x, 1.0};
  const double exponent = f.power * x;
  const bool cut = exponent > kHighest;
  const double bounded = cut ? kHighest : exponent;
  return {::expm1(bounded) / f.power, cut ? 0.0 : ::exp(bounded)};
}

// A function of z alone.
FA_MATH Scored of_margin(const Formula& f, double z) {
  switch (f.pair) {
    case Pair::logistic:
      return {f.first * softplus(-z) + f.second * softplus(z), f.second * logistic(z) - f.first * logistic(-z)};
    case Pair::hinge: return z < f.first ? Scored{f.first - z, -1.0} : Scored{z != z ? z : 0.0, 0.0};
    case Pair::exo: {
      const double q = logistic(z), other = logistic(-z), keep = ::log1p(-f.first), flip = ::log(f.first);
      return {q * (-softplus(-z) - keep) + other * (-softplus(z) - flip), q * other * (z - keep + flip)};
    }
    case Pair::discopop: {
      const double mix = logistic(z / f.first), plain = softplus(-z);
      const double steep = ::exp(-softplus(-z / f.first) - z);  // s(z / first) e^-z, which is never 0 times infinity
      const double slope = mix * (1.0 - mix) / f.first;
      const double steep_slope = steep * (logistic(-z / f.first) / f.first - 1.0);
      return {(1.0 - mix) * plain + steep, -slope * plain - (1.0 - mix) * logistic(-z) + steep_slope};
    }
    default: return {0.0, 0.0};
  }
}

// log(1 - p) / dlog-odds for a mean log-prob: p -> 1 stays finite.
struct Odds {
  double log_odds, slope;
};
FA_MATH Odds odds(double x) {
  const double bounded = x > -kCertain ? -kCertain : x;
  const double rest = -::expm1(bounded);
  return {bounded - (bounded > -0.69314718055994531 ? ::log(rest) : ::log1p(-::exp(bounded))), 1.0 / rest};
}

FA_MATH PairLoss of_scores(const Formula& f, double x, double y) {
  const double bx = f.beta * x, by = f.beta * y, half = 0.5 / f.beta;
  switch (f.pair) {
    case Pair::square: {
      const double gap = x - y - half;
      return {gap * gap, 2.0 * gap, -2.0 * gap};
    }
    case Pair::nca:
      return {softplus(-bx) + 0.5 * softplus(bx) + 0.5 * softplus(by), f.beta * (0.5 * logistic(bx) - logistic(-bx)),
              0.5 * f.beta * logistic(by)};
    case Pair::bco:
      return {softplus(f.target - bx) + softplus(by - f.target), -f.beta * logistic(f.target - bx), f.beta * logistic(by - f.target)};
    case Pair::sppo: return {(x - half) * (x - half) + (y + half) * (y + half), 2.0 * (x - half), 2.0 * (y + half)};
    case Pair::apo_zero:
      return {logistic(-bx) + logistic(by), -f.beta * logistic(bx) * logistic(-bx), f.beta * logistic(by) * logistic(-by)};
    case Pair::apo_down: {
      const double gap = f.beta * logistic(by - bx) * logistic(bx - by);
      return {logistic(bx) + logistic(by - bx), f.beta * logistic(bx) * logistic(-bx) - gap, gap};
    }
    case Pair::orpo: {
      const Odds chosen = odds(x), rejected = odds(y);
      const double ratio = chosen.log_odds - rejected.log_odds, pull = f.beta * logistic(-ratio);
      return {f.beta * softplus(-ratio), -pull * chosen.slope, pull * rejected.slope};
    }
    default: return {0.0, 0.0, 0.0};
  }
}

FA_MATH bool reads_margin(Pair pair) {
  return pair == Pair::logistic || pair == Pair::hinge || pair == Pair::exo || pair == Pair::discopop;
}

// x, y: scores before the transform.
FA_MATH PairLoss pair_loss(const Formula& f, double x, double y, double margin) {
  const Scored chosen = transform(f, x), rejected = transform(f, y);
  PairLoss out;
  if (reads_margin(f.pair)) {
    const Scored z = of_margin(f, f.beta * (chosen.value - rejected.value) - f.target - margin);
    out = {z.value, f.beta * z.slope, -f.beta * z.slope};
  } else {
    out = of_scores(f, chosen.value, rejected.value);
  }
  return {out.loss, out.dx * chosen.slope, out.dy * rejected.slope};
}

// One completion and whether it is desirable; sign = +1 or -1.
//   kto    weight s(-sign beta (x - target))        weight: first for desirable, second for the others
//   bco    weight sp(-sign (beta x - target))
enum class Single { kto, bco };

struct SingleFormula {
  Single single;
  double beta, first, second, target;
};

FA_MATH Scored single_loss(const SingleFormula& f, double x, bool desirable) {
  const double sign = desirable ? 1.0 : -1.0, weight = desirable ? f.first : f.second;
  if (f.single == Single::bco) {
    const double z = sign * (f.beta * x - f.target);
    return {weight * softplus(-z), -weight * sign * f.beta * logistic(-z)};
  }
  const double z = sign * f.beta * (x - f.target);
  return {weight * logistic(-z), -weight * sign * f.beta * logistic(z) * logistic(-z)};
}

// What a sequence's tokens sum to.
struct Sums {
  double logp, ref_logp;
  int64_t length;
};

struct PairResult {
  double loss, chosen_slope, rejected_slope, chosen_reward, rejected_reward;
};

// An empty completion has the sum 0 and, where the score is a mean, the length 1: no NaN.
FA_MATH double tokens(const Sums& s) { return s.length < 1 ? 1.0 : static_cast<double>(s.length); }

FA_MATH PairResult pair_of_sums(const Formula& f, const Sums& chosen, const Sums& rejected, double margin, double weight) {
  const double chosen_unit = f.per_token ? 1.0 / tokens(chosen) : 1.0, rejected_unit = f.per_token ? 1.0 / tokens(rejected) : 1.0;
  const double x = (chosen.logp - chosen.ref_logp) * chosen_unit, y = (rejected.logp - rejected.ref_logp) * rejected_unit;
  const PairLoss l = pair_loss(f, x, y, margin);
  const double nll = f.nll / tokens(chosen);
  return {weight * (l.loss - nll * chosen.logp), weight * (l.dx * chosen_unit - nll), weight * l.dy * rejected_unit, f.beta * x, f.beta * y};
}

template <typename T>
FA_MATH void store_pair(const PairResult& r, const Sums& chosen, const Sums& rejected, int64_t pair, int64_t num_pairs, T* losses,
                        T* metrics, T* slopes) {
  losses[pair] = static_cast<T>(r.loss);
  slopes[2 * pair] = static_cast<T>(r.chosen_slope);
  slopes[2 * pair + 1] = static_cast<T>(r.rejected_slope);
  const double row[6] = {r.chosen_reward, r.rejected_reward, r.chosen_reward - r.rejected_reward,
                         r.chosen_reward > r.rejected_reward ? 1.0 : 0.0, chosen.logp, rejected.logp};
  for (int i = 0; i < 6; ++i) metrics[i * num_pairs + pair] = static_cast<T>(row[i]);
}

template <typename T>
FA_MATH void store_single(const Scored& r, const Sums& one, double weight, double beta, int64_t i, int64_t num_sequences, T* losses,
                          T* metrics, T* slopes) {
  losses[i] = static_cast<T>(weight * r.value);
  slopes[i] = static_cast<T>(weight * r.slope);
  metrics[i] = static_cast<T>(beta * (one.logp - one.ref_logp));
  metrics[num_sequences + i] = static_cast<T>(one.logp);
}

}  // namespace fa::math
