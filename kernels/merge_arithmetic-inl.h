// The angle between two rows and the weights of their shared direction, for any Ops as in kernels/merge_arithmetic.h.
// Included inside a namespace: once for single floats, and once per instruction set, since a function is compiled for
// the instruction set of the place where it stands. No include guard, therefore.

/// c[0] + c[1] * z + c[2] * z^2 + …
template <class Ops, std::size_t kTerms>
KVERN_HOST_DEVICE inline typename Ops::Value polynomial(const float (&c)[kTerms], typename Ops::Value z) {
  typename Ops::Value sum = Ops::set(c[kTerms - 1]);
  for (std::size_t i = kTerms - 1; i > 0; --i) sum = Ops::add(Ops::mul(sum, z), Ops::set(c[i - 1]));
  return sum;
}

/// The arc tangent of a / b, both >= 0 and one of them > 0; error below 2e-7.
template <class Ops>
KVERN_HOST_DEVICE inline typename Ops::Value arc_tangent(typename Ops::Value a, typename Ops::Value b) {
  // Coefficients of the Cephes library's atanf, good up to tan(pi / 8).
  constexpr float kAtan[] = {1.0F, -3.33329491539e-1F, 1.99777106478e-1F, -1.38776856032e-1F, 8.05374449538e-2F};
  constexpr float kTanOfEighth = 0.41421356F;
  const auto smaller = Ops::select_le(a, b, a, b);
  const auto larger = Ops::select_le(a, b, b, a);
  // atan(s / l) = pi / 4 + atan((s - l) / (s + l))
  const auto limit = Ops::mul(larger, Ops::set(kTanOfEighth));
  const auto numerator = Ops::select_le(smaller, limit, smaller, Ops::sub(smaller, larger));
  const auto denominator = Ops::select_le(smaller, limit, larger, Ops::add(smaller, larger));
  const auto start = Ops::select_le(smaller, limit, Ops::set(0.0F), Ops::set(kPi / 4));
  const auto z = Ops::div(numerator, denominator);
  const auto angle = Ops::add(start, Ops::mul(polynomial<Ops>(kAtan, Ops::mul(z, z)), z));
  return Ops::select_le(a, b, angle, Ops::sub(Ops::set(kPi / 2), angle));
}

/// The sine and the cosine of angles in [-pi/2, pi/2], by their series.
template <class Ops>
KVERN_HOST_DEVICE inline typename Ops::Value sine(typename Ops::Value angle) {
  constexpr float kSin[] = {1.0F,          -1.0F / 6,        1.0F / 120,       -1.0F / 5040,
                            1.0F / 362880, -1.0F / 39916800, 1.0F / 6227020800};
  return Ops::mul(polynomial<Ops>(kSin, Ops::mul(angle, angle)), angle);
}
template <class Ops>
KVERN_HOST_DEVICE inline typename Ops::Value cosine(typename Ops::Value angle) {
  constexpr float kCos[] = {1.0F, -1.0F / 2, 1.0F / 24, -1.0F / 720, 1.0F / 40320, -1.0F / 3628800, 1.0F / 479001600};
  return polynomial<Ops>(kCos, Ops::mul(angle, angle));
}

/// The angle Om between unit vectors, of the squared lengths of their difference and their sum.
template <class Ops>
KVERN_HOST_DEVICE inline typename Ops::Value angle_between(typename Ops::Value squared_difference,
                                                           typename Ops::Value squared_sum) {
  return Ops::mul(Ops::set(2.0F), arc_tangent<Ops>(Ops::sqrt(squared_difference), Ops::sqrt(squared_sum)));
}

template <class Ops>
struct Weights {
  typename Ops::Value x;
  typename Ops::Value y;
};

/// Factors of ux and uy in e. With p = (ux + uy) / s and q = (uy - ux) / d, orthonormal, e lies at the angle
/// h = (t - 1/2) Om from p: e = cos(h) p + sin(h) q. Where d vanishes, sin(h) / d is t - 1/2.
template <class Ops>
KVERN_HOST_DEVICE inline Weights<Ops> slerp_weights(typename Ops::Value squared_difference,
                                                    typename Ops::Value squared_sum, typename Ops::Value angle,
                                                    float weight) {
  constexpr float kSmall = 1e-8F;  // d = 1e-4: the error of the limit is below 1e-9
  const auto off_centre = Ops::set(weight - 0.5F);
  const auto h = Ops::mul(off_centre, angle);
  const auto along = Ops::div(cosine<Ops>(h), Ops::sqrt(squared_sum));
  const auto safe = Ops::select_le(squared_difference, Ops::set(kSmall), Ops::set(1.0F), squared_difference);
  const auto across =
      Ops::select_le(squared_difference, Ops::set(kSmall), off_centre, Ops::div(sine<Ops>(h), Ops::sqrt(safe)));
  return {Ops::sub(along, across), Ops::add(along, across)};
}
