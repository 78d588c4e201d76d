// The activations' formulas for all back-ends: value and derivative at u, the input of the activation. u has type V, a
// number (CUDA) or a vector of numbers (CPU); A is the type of the numbers. A back-end includes this file inside its
// namespace and provides BN_EXT_INLINE and, for its Vs, exp_of, expm1_of, tanh_of and normal_cdf_of. At a kink the
// derivative is torch's. Forward and backward passes share `blocked`, so their masks agree.

// relu, leaky_relu and relu6. The derivative is 1 if u passes, otherwise `slope`.
template <typename A>
struct ReluLike {
  A slope;
  A upper;  // u >= upper does not pass either; NaN: no upper limit

  template <typename V>
  BN_EXT_INLINE auto blocked(V u) const {
    return (u <= A(0)) | (u >= upper);
  }
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    const V zero = V{} + A(0);
    const V low = slope == A(0) ? zero : u * slope;  // avoids -inf * 0
    const V high = u >= upper ? zero + upper : u;
    return u <= A(0) ? low : high;
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    return blocked(u) ? V{} + slope : V{} + A(1);
  }
  // g * derivative(u), with a selection per comparison of `blocked`: compilers make better vector code of it.
  template <typename V>
  BN_EXT_INLINE V gradient(V u, V g) const {
    const V low = held_back(g);
    const V high = u >= upper ? low : g;
    return u <= A(0) ? low : high;
  }
  // The gradient of a blocked value.
  template <typename V>
  BN_EXT_INLINE V held_back(V g) const {
    return slope == A(0) ? V{} + A(0) : g * slope;  // avoids inf * 0
  }
};

template <typename A>
struct Elu {
  A alpha;

  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    const V low = expm1_of(u) * alpha;
    return u > A(0) ? u : low;
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V low = exp_of(u) * alpha;
    return u > A(0) ? V{} + A(1) : low;
  }
};

template <typename V>
BN_EXT_INLINE V sigmoid_of(V u) {
  return 1 / (exp_of(-u) + 1);
}

template <typename A>
struct Silu {
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    return u / (exp_of(-u) + 1);
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V s = sigmoid_of(u);
    return s * (u * (1 - s) + 1);
  }
};

template <typename A>
struct Gelu {
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    return u * normal_cdf_of(u);
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V density = exp_of(u * u * A(-0.5)) * A(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return normal_cdf_of(u) + u * density;
  }
};

// u * (1 + tanh(inner)) / 2 = u * sigmoid(2 * inner).
template <typename A>
struct GeluTanh {
  static constexpr A kTwice = A(1.5957691216057307118);  // 2 sqrt(2 / pi)
  static constexpr A kCubic = A(0.044715);

  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    return u * sigmoid_of(u * (u * u * kCubic + 1) * kTwice);
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V s = sigmoid_of(u * (u * u * kCubic + 1) * kTwice);
    const V slope = (u * u * (3 * kCubic) + 1) * kTwice;
    return s + u * s * (1 - s) * slope;
  }
};

template <typename A>
struct Hardswish {
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    const V zero = V{} + A(0);
    const V raised = u + 3;
    const V low = raised < A(0) ? zero : raised;
    return u * (low > A(6) ? zero + A(6) : low) / 6;
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V ramp = u / 3 + A(0.5);
    const V low = u <= A(-3) ? V{} + A(0) : ramp;
    return u >= A(3) ? V{} + A(1) : low;
  }
};

template <typename A>
struct Sigmoid {
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    return sigmoid_of(u);
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V s = sigmoid_of(u);
    return s * (1 - s);
  }
};

template <typename A>
struct Tanh {
  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    return tanh_of(u);
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V t = tanh_of(u);
    return 1 - t * t;
  }
};

// u * tanh(log(1 + e)) with e = exp(u). tanh(log(a)) = (a * a - 1) / (a * a + 1) needs no logarithm. If u > kOne, tanh
// rounds to 1, and e might overflow.
template <typename A>
struct Mish {
  static constexpr A kOne = sizeof(A) == 4 ? A(20) : A(40);

  template <typename V>
  BN_EXT_INLINE V value(V u) const {
    const V e = exp_of(u > kOne ? V{} + kOne : u);
    const V n = e * (e + 2);
    return u * (n / (n + 2));
  }
  template <typename V>
  BN_EXT_INLINE V derivative(V u) const {
    const V low = u > kOne ? V{} + kOne : u;
    const V e = exp_of(low);
    const V n = e * (e + 2);
    const V inverse = 1 / (n + 2);
    return n * inverse + low * e * (e + 1) * inverse * (4 * inverse);
  }
};

// Calls body(formula) with the formula of the activation, which must not be kNone.
template <typename A, typename Body>
BN_EXT_INLINE auto with_formula(const Activation& activation, const Body& body) {
  switch (activation.kind) {
    case ActivationKind::kElu:
      return body(Elu<A>{static_cast<A>(activation.alpha)});
    case ActivationKind::kSilu:
      return body(Silu<A>{});
    case ActivationKind::kGelu:
      return body(Gelu<A>{});
    case ActivationKind::kGeluTanh:
      return body(GeluTanh<A>{});
    case ActivationKind::kHardswish:
      return body(Hardswish<A>{});
    case ActivationKind::kSigmoid:
      return body(Sigmoid<A>{});
    case ActivationKind::kTanh:
      return body(Tanh<A>{});
    case ActivationKind::kMish:
      return body(Mish<A>{});
    default:
      return body(ReluLike<A>{static_cast<A>(activation.alpha), static_cast<A>(activation.upper)});
  }
}
