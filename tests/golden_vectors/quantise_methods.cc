// KIVI's groups and fp8, and how far the stored forms stay from them.

#include <algorithm>
#include <cmath>

#include "kernels/codec_step.h"
#include "kernels/kivi.h"
#include "kernels/quantise_arithmetic.h"
#include "tests/golden_vectors/methods.h"

namespace kvern {
MakeForm make_int4_form, make_int2_form;
}

namespace kvern::golden {

namespace {

/// A tensor [heads][tokens][dim], quantised along tokens or channels.
struct Quantised {
  Quantised(const Tensor& tensor, std::uint32_t bits, std::size_t group, bool along_tokens) {
    const std::vector<float> values = tensor.floats();
    const std::size_t dim = tensor.columns();
    const std::size_t tokens = tensor.shape.at(tensor.shape.size() - 2);
    const std::size_t length = along_tokens ? tokens : dim;
    const std::size_t groups = (length + group - 1) / group;
    codes.resize(values.size());
    dequantised.resize(values.size());
    scales.resize(values.size() / length * groups);
    lows.resize(scales.size());
    const std::size_t stride = along_tokens ? dim : 1;
    for (std::size_t plane = 0; plane < values.size(); plane += tokens * dim) {
      for (std::size_t line = 0; line < tokens * dim / length; ++line) {
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t count = std::min(group, length - g * group);
          const std::size_t first = plane + g * group * stride + (along_tokens ? line : line * dim);
          const kivi::Group made = kivi::quantise(&values[first], &codes[first], count, stride, bits);
          // [head][group][channel] or [head][token][group].
          const std::size_t at = plane / length * groups + (along_tokens ? g * dim + line : line * groups + g);
          scales[at] = made.scale;
          lows[at] = made.low;
          for (std::size_t i = 0; i < count; ++i) {
            dequantised[first + i * stride] = made.decode(codes[first + i * stride]);
          }
        }
      }
    }
  }
  std::vector<std::uint8_t> codes;
  std::vector<float> dequantised, scales, lows;
};

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

/// The stored form has scales of fewer bits; that must not show.
void expect_form_is_as_good(CaseRun& run, const Tensor& tensor, Part part, std::uint32_t bits, const Quantised& kivi) {
  if (bits != 4 && bits != 2) return;
  const auto form = check(bits == 4 ? make_int4_form({"int4", {}}) : make_int2_form({"int2", {}}));
  const auto tokens = static_cast<std::uint32_t>(tensor.shape.at(1));
  const PlaneShape shape{DType::kFloat32, part, tokens, static_cast<std::uint32_t>(tensor.columns())};
  const std::vector<float> values = tensor.floats();
  std::vector<float> restored(values.size());
  std::vector<std::byte> storage(form->max_bytes(shape) + 64);
  const std::size_t offset = (64 - reinterpret_cast<std::uintptr_t>(storage.data()) % 64) % 64;
  const auto payload = std::span(storage).subspan(offset, form->max_bytes(shape));
  for (std::size_t first = 0; first < values.size(); first += std::size_t{tokens} * shape.dim) {
    const auto plane = std::as_bytes(std::span(values).subspan(first, std::size_t{tokens} * shape.dim));
    const std::size_t size = check(form->encode(shape, plane, payload));
    check(form->decode(shape, payload.first(size), {0, tokens}, reinterpret_cast<std::byte*>(&restored[first])));
  }
  run.expect(error(restored, values) <= 1.02 * error(kivi.dequantised, values), "the stored form is as good as KIVI");
}

void kivi_quant(CaseRun& run) {
  const std::uint32_t bits = run.number("bits");
  const Tensor& k = run.input("K");
  const Quantised keys(k, bits, run.number("group"), true);
  run.output("k_codes", keys.codes);
  run.output("k_scale", keys.scales);
  run.output("k_min", keys.lows);
  run.output("k_dequant", keys.dequantised);
  if (run.expects("k_words")) run.output("k_words", words_of(keys, k.shape.at(1), k.columns(), bits));
  expect_form_is_as_good(run, k, Part::kKey, bits, keys);
  if (!run.has_input("V")) return;
  const Quantised values(run.input("V"), bits, run.number("group"), false);
  run.output("v_codes", values.codes);
  run.output("v_bytes", bytes_of(values, bits));
  run.output("v_scale", values.scales);
  run.output("v_min", values.lows);
  run.output("v_dequant", values.dequantised);
  expect_form_is_as_good(run, run.input("V"), Part::kValue, bits, values);
}

void quant_asym(CaseRun& run) {
  const Quantised of(run.input("x"), run.number("bits"), run.number("group"), false);
  run.output("codes", of.codes);
  run.output("scale", of.scales);
  run.output("min", of.lows);
  run.output("dequant", of.dequantised);
  double sum = 0;
  for (const float value : of.dequantised) sum += double{value} * double{value};
  run.output("norm", std::vector<double>{std::sqrt(sum)});
}

/// Codes of values by one scale per `count` neighbouring values.
void give_fp8(CaseRun& run, const std::vector<float>& values, std::size_t count, const std::string& suffix) {
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
}

void fp8_e4m3(CaseRun& run) {
  if (run.has_input("K")) {
    const Tensor& keys = run.input("K");
    give_fp8(run, keys.floats(), keys.size(), "_tensor");
    give_fp8(run, keys.floats(), keys.columns(), "_token_head");
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
}

}  // namespace

void add_quantise_methods(Methods& methods) {
  methods["kivi_quant"] = kivi_quant;
  methods["quant_asym"] = quant_asym;
  methods["fp8_e4m3"] = fp8_e4m3;
}

}  // namespace kvern::golden
