// KIVI's groups and fp8, and how far the stored forms stay from them.

#include <algorithm>
#include <cmath>

#include "kernels/quantise_arithmetic.h"
#include "tests/golden_vectors/kivi_planes.h"
#include "tests/golden_vectors/methods.h"

namespace kvern::golden {

namespace {

/// How much larger the error of a stored form may be than that of the published quantisation of as many bits: its
/// scales have 8 bits of mantissa, int8r has 240 steps from end to end, int8 is symmetric (half a range is lost at
/// worst in groups that lie to one side; 1.15 and 1.39 in the case of 8 bits).
constexpr double kStored = 1.02;
constexpr double kStoredResidual = 1.1;
constexpr double kStoredSymmetric = 1.5;

/// Codes of 32 / bits consecutive tokens of a channel in one word, lowest bits first.
std::vector<std::uint32_t> words_of(const Quantised& of, std::size_t tokens, std::size_t dim, std::uint32_t bits) {
  const std::size_t per_word = 32 / bits;
  std::vector<std::uint32_t> words(of.codes.size() / per_word);
  for (std::size_t i = 0; i < of.codes.size(); ++i) {
    const std::size_t token = i / dim % tokens;
    const std::size_t word = (i / dim / tokens * (tokens / per_word) + token / per_word) * dim + i % dim;
    words[word] |= std::uint32_t{of.codes[i]} << (bits * (token % per_word));
  }
  return words;
}

/// Codes of 8 / bits consecutive channels in one byte, lowest bits first.
std::vector<std::uint8_t> bytes_of(const Quantised& of, std::uint32_t bits) {
  const std::size_t per_byte = 8 / bits;
  std::vector<std::uint8_t> bytes(of.codes.size() / per_byte);
  for (std::size_t i = 0; i < of.codes.size(); ++i) {
    bytes[i / per_byte] = static_cast<std::uint8_t>(bytes[i / per_byte] | of.codes[i] << (bits * (i % per_byte)));
  }
  return bytes;
}

double error(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  return std::sqrt(sum);
}

/// The rows of a tensor [heads][tokens][dim] after a form has stored them, plane by plane.
template <typename Form>
std::vector<float> stored(const Backend& on, const Form& form, const std::vector<float>& values) {
  std::vector<float> restored;
  const std::size_t plane = std::size_t{form.tokens} * form.dim;
  for (std::size_t first = 0; first < values.size(); first += plane) {
    const auto section = on.encode(form, std::as_bytes(std::span(values).subspan(first, plane)));
    const auto rows = on.decode(form, section);
    restored.resize(first + plane);
    std::memcpy(&restored[first], rows.data(), rows.size());
  }
  return restored;
}

template <typename Form>
void expect_form_within(CaseRun& run, const Backend& on, const Form& form, const std::vector<float>& values,
                        std::span<const float> published, double factor, const char* name) {
  const double ours = error(stored(on, form, values), values);
  run.expect(ours <= factor * error(published, values),
             std::string(name) + ": the stored form is as good as published");
}

/// A form as a chain of its name alone makes it.
quantise::Form default_form(const Tensor& tensor, Part part, quantise::Kind kind, quantise::Scheme scheme) {
  const auto tokens = static_cast<std::uint32_t>(tensor.shape.at(1));
  const auto dim = static_cast<std::uint32_t>(tensor.columns());
  const bool keys = part == Part::kKey;
  return {DType::kFloat32, keys, tokens, dim, keys ? 64 : quantise::Form::channel_group(dim, 64), kind, scheme};
}

/// The stored forms have scales of fewer bits; that must not show.
void expect_forms_are_as_good(CaseRun& run, const Backend& on, const Tensor& tensor, Part part, std::uint32_t bits,
                              const Quantised& kivi) {
  const std::vector<float> values = tensor.floats();
  const auto expect = [&](quantise::Kind kind, double factor, const char* name) {
    expect_form_within(run, on, default_form(tensor, part, kind, quantise::Scheme::kAsymmetric), values,
                       kivi.dequantised, factor, name);
  };
  if (bits == 2) expect(quantise::Kind::kInt2, kStored, "int2");
  if (bits == 4) expect(quantise::Kind::kInt4, kStored, "int4");
  if (bits != 8) return;
  expect(quantise::Kind::kInt8Residual, kStoredResidual, "int8r");
  const auto form = default_form(tensor, part, quantise::Kind::kInt4, quantise::Scheme::kSymmetric);
  expect_form_within(run, on,
                     int8::Form{form.dtype, form.per_channel, form.tokens, form.dim,
                                form.per_channel ? 64 : int8::Form::channel_group(form.dim)},
                     values, kivi.dequantised, kStoredSymmetric, "int8");
}

void kivi_quant(CaseRun& run, const Backend& on) {
  const std::uint32_t bits = run.number("bits");
  const Tensor& k = run.input("K");
  const Quantised keys(k, bits, run.number("group"), true);
  run.output("k_codes", keys.codes);
  run.output("k_scale", keys.scales);
  run.output("k_min", keys.lows);
  run.output("k_dequant", keys.dequantised);
  if (run.expects("k_words")) run.output("k_words", words_of(keys, k.shape.at(1), k.columns(), bits));
  expect_forms_are_as_good(run, on, k, Part::kKey, bits, keys);
  if (!run.has_input("V")) return;
  const Quantised values(run.input("V"), bits, run.number("group"), false);
  run.output("v_codes", values.codes);
  run.output("v_bytes", bytes_of(values, bits));
  run.output("v_scale", values.scales);
  run.output("v_min", values.lows);
  run.output("v_dequant", values.dequantised);
  expect_forms_are_as_good(run, on, run.input("V"), Part::kValue, bits, values);
}

/// Codes of values by one scale per `count` neighbouring values; what they decode to.
std::vector<float> give_fp8(CaseRun& run, const std::vector<float>& values, std::size_t count,
                            const std::string& suffix) {
  std::vector<float> scales, dequantised;
  std::vector<std::uint8_t> codes;
  for (std::size_t first = 0; first < values.size(); first += count) {
    float largest = 0;
    for (std::size_t i = first; i < first + count; ++i) largest = std::max(largest, std::abs(values[i]));
    scales.push_back(largest / quantise::kLargestE4m3);
    for (std::size_t i = first; i < first + count; ++i) {
      codes.push_back(quantise::to_e4m3(values[i] / scales.back()));
      dequantised.push_back(quantise::from_e4m3(codes.back()) * scales.back());
    }
  }
  run.output("scale" + suffix, scales);
  run.output("codes" + suffix, codes);
  run.output("dequant" + suffix, dequantised);
  return dequantised;
}

/// Rows of an fp8 form whose groups are rows of 16 channels.
quantise::Form fp8_rows(std::size_t rows) {
  return {DType::kFloat32,
          false,
          static_cast<std::uint32_t>(rows),
          16,
          16,
          quantise::Kind::kFp8,
          quantise::Scheme::kSymmetric};
}

/// The form's codes of values up to 448, beside which the largest number makes the scale 1.
void expect_form_codes(CaseRun& run, const Backend& on) {
  const std::vector<float> values = run.input("x").floats();
  std::vector<float> plane;
  std::vector<std::size_t> places(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!(std::abs(values[i]) <= quantise::kLargestE4m3)) continue;
    if (plane.size() % 16 == 0) plane.push_back(quantise::kLargestE4m3);
    places[i] = plane.size();
    plane.push_back(values[i]);
  }
  plane.resize((plane.size() + 15) / 16 * 16);
  const quantise::Form form = fp8_rows(plane.size() / 16);
  const auto section = on.encode(form, std::as_bytes(std::span<const float>(plane)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (places[i] == 0) continue;
    const auto code = std::to_integer<std::int64_t>(section[form.first_at() + places[i]]);
    run.expect(code == run.expected("codes").integer(i),
               "the form's code of " + std::to_string(values[i]) + " is " + std::to_string(code));
  }
}

/// What the form makes of every code that there is, with scales of 1.
void expect_form_decodes(CaseRun& run, const Backend& on) {
  const quantise::Form form = fp8_rows(16);
  std::vector<std::byte> section(form.section_bytes());
  const std::uint16_t one = to_bfloat16(1);
  for (std::size_t row = 0; row < 16; ++row) std::memcpy(&section[2 * row], &one, sizeof one);
  const auto is_nan = [](std::size_t code) { return (code & 0x7F) == 0x7F; };
  for (std::size_t code = 0; code < 256; ++code) {
    section[form.first_at() + code] = is_nan(code) ? std::byte{0} : static_cast<std::byte>(code);
  }
  const auto rows = on.decode(form, section);
  for (std::size_t code = 0; code < 256; ++code) {
    float value = 0;
    std::memcpy(&value, &rows[4 * code], sizeof value);
    run.expect(is_nan(code) || value == run.expected("decode_table").number(code),
               "the form decodes " + std::to_string(code) + " to " + std::to_string(value));
  }
}

void fp8_e4m3(CaseRun& run, const Backend& on) {
  if (run.has_input("K")) {
    const Tensor& keys = run.input("K");
    const std::vector<float> values = keys.floats();
    give_fp8(run, values, keys.size(), "_tensor");
    const auto published = give_fp8(run, values, keys.columns(), "_token_head");
    const auto form = default_form(keys, Part::kValue, quantise::Kind::kFp8, quantise::Scheme::kSymmetric);
    expect_form_within(run, on, form, values, published, kStored, "fp8");
    return;
  }
  std::vector<std::uint8_t> codes;
  for (const float value : run.input("x").floats()) codes.push_back(quantise::to_e4m3(value));
  run.output("codes", codes);
  std::vector<float> table;
  for (std::uint32_t code = 0; code < 256; ++code) {
    table.push_back(quantise::from_e4m3(static_cast<std::uint8_t>(code)));
  }
  run.output("decode_table", table);
  expect_form_codes(run, on);
  expect_form_decodes(run, on);
}

}  // namespace

void add_quantise_methods(Methods& methods, const Backend& on) {
  methods["kivi_quant"] = run_on(kivi_quant, on);
  methods["fp8_e4m3"] = run_on(fp8_e4m3, on);
}

}  // namespace kvern::golden
