#pragma once

#include "kernels/element.h"

/// Rotary position embedding, the arithmetic that CPU and GPU share. Every step is one correctly rounded IEEE
/// operation, so that turned keys are the same bytes everywhere.
namespace kvern::rope {

struct CosineSine {
  float cosine = 1;
  float sine = 0;
};

/// Of an angle in fp64, rounded to fp32. Cody and Waite's reduction by pi/2 in three parts of 33 bits, exact up to 2^20
/// quarter turns, then the polynomials of fdlibm: far more exact than fp32 shows, and free of the differences between
/// mathematical libraries.
KVERN_HOST_DEVICE inline CosineSine cosine_sine(double angle) {
  constexpr double kTwoOverPi = 6.36619772367581382433e-01;
  constexpr double kPi1 = 1.57079632673412561417e+00;
  constexpr double kPi2 = 6.07710050630396597660e-11;
  constexpr double kPi3 = 2.02226624871116645580e-21;
  // Adding 1.5 * 2^52 leaves a whole number in the lowest bits; taking it away rounds to that.
  constexpr double kRounder = 6755399441055744.0;
  const double shifted = angle * kTwoOverPi + kRounder;
  const double quarters = shifted - kRounder;
  const double x = ((angle - quarters * kPi1) - quarters * kPi2) - quarters * kPi3;
  const double z = x * x;
  const double sine = x + x * z *
                              (-1.66666666666666324348e-01 +
                               z * (8.33333333332248946124e-03 +
                                    z * (-1.98412698298579493134e-04 +
                                         z * (2.75573137070700676789e-06 +
                                              z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double cosine = 1 - 0.5 * z +
                        z * z *
                            (4.16666666666666019037e-02 +
                             z * (-1.38888888888741095749e-03 +
                                  z * (2.48015872894767294178e-05 +
                                       z * (-2.75573143513906633035e-07 +
                                            z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  const auto quadrant = std::bit_cast<std::uint64_t>(shifted) & 3U;
  const double c = (quadrant & 1) == 0 ? cosine : sine;
  const double s = (quadrant & 1) == 0 ? sine : cosine;
  return {static_cast<float>(quadrant == 1 || quadrant == 2 ? -c : c), static_cast<float>(quadrant >= 2 ? -s : s)};
}

/// Turns the pair (a, b) by the angle.
KVERN_HOST_DEVICE inline void turn(CosineSine by, float& a, float& b) {
  const float first = a * by.cosine - b * by.sine;
  b = b * by.cosine + a * by.sine;
  a = first;
}

}  // namespace kvern::rope
