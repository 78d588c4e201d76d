// Vector functions that the activations need, accurate to a few units in the last place. exp returns 0 instead of
// subnormal numbers, and inf already slightly below the largest number.
#include "walk.inl"

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -87.3f;  // its power of two is the smallest normal number
  static constexpr float kHighest = 88.3f;
  static constexpr float kRounder = 0x1.8p23f;    // adding it rounds to an integer, held in the lowest bits
  static constexpr float kLn2High = 0x1.62ep-1f;  // few bits: its product with an integer is exact
  static constexpr float kLn2Low = 0x1.0bfbe8p-15f;
  static constexpr int32_t kBias = 127;
  static constexpr int kMantissa = 23;
  // (expm1(r) - r - r^2 / 2) / r^3 for |r| <= ln(2) / 2, by Chebyshev interpolation.
  static constexpr float kTerms[] = {
      1.6666666682e-1f, 4.1666554640e-2f, 8.3333109317e-3f, 1.3926178610e-3f, 1.9890983131e-4f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -708.3;
  static constexpr double kHighest = 709.4;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int64_t kBias = 1023;
  static constexpr int kMantissa = 52;
  static constexpr double kTerms[] = {1.6666666666666667452e-1,
                                      4.1666666666666669752e-2,
                                      8.3333333333300641503e-3,
                                      1.3888888888883752066e-3,
                                      1.9841269863041790677e-4,
                                      2.4801587325534414561e-5,
                                      2.7557268478651017745e-6,
                                      2.7557273660182228841e-7,
                                      2.5100376523172229501e-8,
                                      2.0914679808184042147e-9};
};

template <typename A, int kCount>
BN_EXT_INLINE Vec<A> polynomial(Vec<A> x, const A (&terms)[kCount]) {
  Vec<A> sum = broadcast(terms[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + terms[i];
  return sum;
}

// exp(x) = power + power * rest, where power is a power of two.
template <typename A>
struct ExpParts {
  Vec<A> power;
  Vec<A> rest;
};
template <typename A>
BN_EXT_INLINE ExpParts<A> exp_parts(Vec<A> x) {
  using C = ExpConstants<A>;
  x = x < C::kLowest ? broadcast(C::kLowest) : x;
  x = x > C::kHighest ? broadcast(C::kHighest) : x;
  const Vec<A> shifted = x * A(1.4426950408889634074) + C::kRounder;
  const Vec<A> whole = shifted - C::kRounder;
  const Vec<A> r = (x - whole * C::kLn2High) - whole * C::kLn2Low;
  const Mask<A> exponent = (Mask<A>)shifted - (Mask<A>)broadcast(C::kRounder) + C::kBias;
  return {(Vec<A>)(exponent << C::kMantissa), r + r * r * (r * polynomial<A>(r, C::kTerms) + A(0.5))};
}

template <typename A>
BN_EXT_INLINE Vec<A> exp_of_vector(Vec<A> x) {
  const ExpParts<A> e = exp_parts<A>(x);
  const Vec<A> low = x < ExpConstants<A>::kLowest ? Vec<A>{} : e.power + e.power * e.rest;
  return x > ExpConstants<A>::kHighest ? broadcast(A(__builtin_inf())) : low;
}
template <typename A>
BN_EXT_INLINE Vec<A> expm1_of_vector(Vec<A> x) {
  const ExpParts<A> e = exp_parts<A>(x);
  return (e.power - 1) + e.power * e.rest;
}

// Uses expm1, so that a small x keeps all its digits.
template <typename A>
BN_EXT_INLINE Vec<A> tanh_of_vector(Vec<A> x) {
  const Vec<A> e = expm1_of_vector<A>((x < 0 ? -x : x) * 2);
  const Vec<A> t = e / (e + 2);  // 1 for the largest x
  return x < 0 ? -t : t;
}

BN_EXT_INLINE Vec<float> exp_of(Vec<float> x) { return exp_of_vector<float>(x); }
BN_EXT_INLINE Vec<double> exp_of(Vec<double> x) { return exp_of_vector<double>(x); }
BN_EXT_INLINE Vec<float> expm1_of(Vec<float> x) { return expm1_of_vector<float>(x); }
BN_EXT_INLINE Vec<double> expm1_of(Vec<double> x) { return expm1_of_vector<double>(x); }
BN_EXT_INLINE Vec<float> tanh_of(Vec<float> x) { return tanh_of_vector<float>(x); }
BN_EXT_INLINE Vec<double> tanh_of(Vec<double> x) { return tanh_of_vector<double>(x); }

// The CDF of the normal distribution: erfc(-x / sqrt(2)) / 2. With z = |x| / sqrt(2) and t = 2 / (2 + z), the function
// exp(z^2) erfc(z) / t is smooth in t. The terms are its Chebyshev interpolation, a polynomial in 2t - 1.
BN_EXT_INLINE Vec<float> normal_cdf_of(Vec<float> x) {
  static constexpr float kTerms[] = {5.1079135692e-1f,
                                     3.4358031871e-1f,
                                     1.3973573352e-1f,
                                     1.8221669428e-2f,
                                     -1.0751626187e-2f,
                                     -3.2434519181e-3f,
                                     1.5291571608e-3f,
                                     4.3067048849e-4f,
                                     -2.9938271208e-4f,
                                     -3.6601876945e-5f,
                                     4.2161197200e-5f};
  const Vec<float> z = (x < 0 ? -x : x) * 0.70710678f;
  const Vec<float> t = 2 / (z + 2);
  const Vec<float> tail = exp_of(x * x * -0.5f) * t * polynomial<float>(t * 2 - 1, kTerms) * 0.5f;
  return x < 0 ? tail : 1 - tail;
}
// One value at a time, because float64 is for checking.
BN_EXT_INLINE Vec<double> normal_cdf_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return x;
}

// The formulas that use these functions.
#include "../activation.inl"
