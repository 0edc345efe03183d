// RoPE: rotation at positions, by constant shifts, and of slots that move.

#include <algorithm>
#include <cmath>

#include "kernels/rope.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

void rope_case(CaseRun& run, const Backend& on) {
  constexpr auto kForward = rope::Direction::kForward;
  const HeadRows keys = run.input("k").head_rows();
  rope::Parameters parameters;
  parameters.theta = run.param("theta").get<double>();
  parameters.rotary_dim = run.number("d");
  const std::vector<double> frequencies = parameters.inverse_frequencies();
  run.output("inv_freq", frequencies);
  const auto positions = run.param("positions").get<std::vector<std::int64_t>>();
  const std::vector<float> at_positions = on.rotate(keys, on.turns_at(frequencies, positions), kForward);
  run.output("rotated", at_positions);
  std::vector<double> given;
  for (std::size_t i = 0; i < frequencies.size(); ++i) given.push_back(run.expected("inv_freq").value(i));
  run.output("rotated_fp32_angle", on.rotate(keys, rope::Turns::at_fp32_angles(given, positions), kForward));

  const Tensor& before = run.expected("rotated");
  for (const auto& shift : run.param("shifts")) {
    const auto by = shift.get<std::int64_t>();
    run.output("shift_" + std::to_string(by),
               on.rotate(before.head_rows(), on.turns_at(frequencies, {&by, 1}), kForward));
  }
  const auto slots = run.param("repack_slots").get<std::vector<std::size_t>>();
  std::vector<std::int64_t> moves;
  std::vector<float> moved;
  for (std::size_t head = 0; head < keys.heads; ++head) {
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (head == 0) moves.push_back(static_cast<std::int64_t>(i) - positions[slots[i]]);
      for (std::size_t column = 0; column < keys.dim; ++column) {
        moved.push_back(before.number((head * keys.tokens + slots[i]) * keys.dim + column));
      }
    }
  }
  const Tensor rows = Tensor::of<float>(moved, {keys.heads, slots.size(), keys.dim});
  run.output("repacked", on.rotate(rows.head_rows(), on.turns_at(frequencies, moves), kForward));

  const Tensor there = Tensor::of<float>(at_positions, run.input("k").shape);
  const std::vector<float> back =
      on.rotate(there.head_rows(), on.turns_at(frequencies, positions), rope::Direction::kBack);
  for (std::size_t i = 0; i < back.size(); ++i) {
    run.expect(std::abs(back[i] - run.input("k").number(i)) < 1e-5F, "turning back gives the key");
  }
}

}  // namespace

void add_rotate_methods(Methods& methods, const Backend& on) { methods["rope"] = run_on(rope_case, on); }

}  // namespace kvern::golden
