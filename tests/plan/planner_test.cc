#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "plan/model_size.h"
#include "plan/planner.h"

namespace kvern::plan {
namespace {

/// Writes a config.json and asks for its size.
Result<double> size_of(const std::string& json) {
  const std::string path = testing::TempDir() + "kvern_plan_config_" + std::to_string(::getpid()) + ".json";
  std::ofstream(path) << json;
  auto bytes = kv_bytes_per_token(path);
  std::filesystem::remove(path);
  return bytes;
}

TEST(ModelSize, IsThatOfItsConfig) {
  EXPECT_EQ(*kv_bytes_per_token("131072"), 131072);
  // Llama 3.1 8B.
  EXPECT_EQ(*size_of(R"({"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 32,
                         "hidden_size": 4096, "torch_dtype": "bfloat16"})"),
            131072);
  EXPECT_EQ(*size_of(R"({"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "dtype": "float32"})"),
            1024);
  EXPECT_EQ(*size_of(R"({"text_config": {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 64}})"), 256);
  // DeepSeek V3: one latent row per token and layer.
  EXPECT_EQ(*size_of(R"({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64})"), 61 * 576 * 2);
}

TEST(ModelSize, SaysWhatIsMissing) {
  EXPECT_EQ(kv_bytes_per_token("0").error().message(), "the bytes per token must be above 0");
  EXPECT_EQ(kv_bytes_per_token("/nowhere").error().code(), Code::kNotFound);
  EXPECT_NE(size_of("[]").error().message().find("expected the JSON object of a config.json"), std::string::npos);
  EXPECT_NE(size_of("{}").error().message().find("it has no num_hidden_layers"), std::string::npos);
  EXPECT_NE(size_of(R"({"num_hidden_layers": -1})").error().message().find("it has no num_hidden_layers"),
            std::string::npos);
  EXPECT_NE(size_of(R"({"num_hidden_layers": 1, "torch_dtype": "int4"})").error().message().find("int4 is not known"),
            std::string::npos);
  EXPECT_NE(size_of(R"({"num_hidden_layers": 1, "num_attention_heads": 1})").error().message().find("no head_dim"),
            std::string::npos);
}

/// Forty documents of four blocks each, over and over.
Trace loop() {
  Trace trace{.block_tokens = 512, .distinct_blocks = 160};
  for (std::uint32_t i = 0; i < 400; ++i) {
    TraceRequest request{.timestamp_ms = i, .input_tokens = 2048};
    for (std::uint32_t block = 0; block < 4; ++block) request.blocks.push_back(i % 40 * 4 + block);
    trace.input_tokens += 2048;
    trace.requests.push_back(request);
  }
  return trace;
}

constexpr std::uint64_t kBlockBytes = 512 * 1000;

PlanOptions options() {
  PlanOptions all;
  all.bytes_per_token = 1000;
  all.dram_bytes = {200 * kBlockBytes, 400 * kBlockBytes};
  all.codecs = {"raw", "balanced"};
  return all;
}

TEST(Planner, ChoosesTheLeastThatIsAsGood) {
  const auto plan = make_plan(loop(), options());
  ASSERT_TRUE(plan) << plan.error().message();
  ASSERT_EQ(plan->rows.size(), 4U);
  // Everything fits everywhere, so that the smaller tier without any error is enough.
  for (const PlanRow& row : plan->rows) EXPECT_DOUBLE_EQ(row.report.hit_rate(), 0.9);
  EXPECT_EQ(plan->rows[plan->chosen].label(), "raw, DRAM 97.7 MiB");
}

TEST(Planner, CompressesWhereThatPays) {
  auto small = options();
  small.dram_bytes = {60 * kBlockBytes};
  const auto plan = make_plan(loop(), small);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->rows[plan->chosen].codec, "balanced");
  EXPECT_LT(plan->rows[1].first_token_seconds, plan->rows[0].first_token_seconds);
  EXPECT_LT(plan->rows[0].first_token_seconds, plan->first_token_seconds_without);
}

TEST(Planner, TimesTheFirstTokenByWhatIsReadAndComputed) {
  auto one = options();
  one.dram_bytes = {1'000 * kBlockBytes};
  one.codecs = {"raw"};
  one.speeds.prefill_tokens_per_second = 1024;
  one.speeds.dram_bytes_per_second = 4 * kBlockBytes * 1.002 * 4;
  const auto plan = make_plan(loop(), one);
  ASSERT_TRUE(plan);
  EXPECT_DOUBLE_EQ(plan->first_token_seconds_without, 2);
  // 40 requests compute for two seconds, 360 read for a quarter of one.
  EXPECT_NEAR(plan->rows[0].first_token_seconds, 0.1 * 2 + 0.9 * 0.25, 1e-9);
  EXPECT_NEAR(plan->rows[0].first_token_seconds_p95, 2, 1e-9);
}

TEST(Planner, TriesEveryCombinationOfTiers) {
  auto tiers = options();
  tiers.dram_bytes = {50 * kBlockBytes};
  tiers.nvme_bytes = {60 * kBlockBytes, 300 * kBlockBytes};
  tiers.remote_bytes = {0};
  tiers.codecs = {"raw"};
  const auto plan = make_plan(loop(), tiers);
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->rows.size(), 2U);
  EXPECT_EQ(plan->rows[1].label(), "raw, DRAM 24.4 MiB, NVMe 146.5 MiB, remote without limit");
  for (const PlanRow& row : plan->rows) EXPECT_DOUBLE_EQ(row.report.hit_rate(), 0.9);
  EXPECT_EQ(plan->rows[1].report.tiers[2].hit_tokens, 0U);
  EXPECT_GT(plan->rows[0].report.tiers[2].hit_tokens, 0U);
}

TEST(Planner, SaysWhatIsWrongWithOptions) {
  const auto message = [](auto change) {
    PlanOptions changed = options();
    change(changed);
    const auto plan = make_plan(loop(), changed);
    return plan ? std::string() : plan.error().message();
  };
  EXPECT_NE(message([](PlanOptions& o) { o.codecs = {"int5"}; }).find("use one of exact, balanced, compact, \"raw\""),
            std::string::npos);
  EXPECT_EQ(message([](PlanOptions& o) { o.codecs = {}; }), "there is no codec to try");
  EXPECT_EQ(message([](PlanOptions& o) { o.dram_bytes = {}; }), "there is no size of the DRAM tier to try");
  EXPECT_EQ(message([](PlanOptions& o) { o.bytes_per_token = 0; }), "bytes_per_token must be above 0");
  EXPECT_EQ(message([](PlanOptions& o) { o.speeds.nvme_bytes_per_second = 0; }),
            "nvme_bytes_per_second must be above 0");
  EXPECT_NE(message([](PlanOptions& o) { o.policy = "mru"; }).find("use one of lru"), std::string::npos);
  EXPECT_NE(message([](PlanOptions& o) {
              o.codecs = {"compact"};
              o.max_relative_error = 0.001;
            }).find("use a more exact one"),
            std::string::npos);
}

TEST(Planner, PrintsAndDrawsWhatItFound) {
  auto all = options();
  all.nvme_bytes = {300 * kBlockBytes};
  const Trace trace = loop();
  const auto plan = make_plan(trace, all);
  ASSERT_TRUE(plan);
  std::ostringstream text;
  print_plan(trace, *plan, text);
  EXPECT_NE(text.str().find("400 requests, 819200 prompt tokens"), std::string::npos);
  EXPECT_NE(text.str().find("\nUse: raw, DRAM 97.7 MiB, NVMe 146.5 MiB"), std::string::npos) << text.str();
  std::ostringstream chart;
  write_chart(*plan, chart);
  EXPECT_EQ(chart.str().rfind("<svg ", 0), 0U);
  EXPECT_NE(chart.str().find("balanced, DRAM 195.3 MiB"), std::string::npos);
  EXPECT_NE(chart.str().find("</svg>"), std::string::npos);
}

}  // namespace
}  // namespace kvern::plan
