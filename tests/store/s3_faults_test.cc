#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "store/s3_tier.h"
#include "tests/store/fake_server.h"
#include "tests/store/tier_samples.h"

namespace kvern::testing {
namespace {

constexpr std::int64_t kMs = 1'000'000;

S3TierConfig config_of(std::uint16_t port) {
  S3TierConfig config;
  config.bucket.endpoint = "http://127.0.0.1:" + std::to_string(port);
  config.bucket.bucket = "bucket";
  config.bucket.path_style = true;
  config.bucket.access_key_id = {.value = "id"};
  config.bucket.secret_access_key = {.value = "secret"};
  config.retries = {.first_pause_ns = kMs, .max_pause_ns = 5 * kMs};
  config.find_timeout_ns = config.read_timeout_ns = config.write_timeout_ns = 20'000 * kMs;
  config.breaker.failures = 1000;
  config.breaker.stall_ns = 100'000 * kMs;
  return config;
}

std::string text_of(const SampleObject& sample) {
  const auto bytes = sample.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string whole(const SampleObject& sample) {
  const std::string body = text_of(sample);
  const auto last = std::to_string(body.size() - 1);
  return FakeHttp::respond("206 Partial Content", body,
                           "Content-Range: bytes 0-" + last + "/" + std::to_string(body.size()) + "\r\n");
}

std::string error_body(const std::string& code) {
  return "<Error><Code>" + code + "</Code><Message>m</Message></Error>";
}

TEST(S3TierFaults, TriesAgainWhatMayPass) {
  const SampleObject sample(1, 4, {8192});
  for (const char* trouble :
       {"500 Internal Server Error", "503 Slow Down", "429 Too Many Requests", "502 Bad Gateway"}) {
    std::atomic<int> attempts = 0;
    FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
      return {.text = ++attempts < 3 ? FakeHttp::respond(trouble, error_body("SlowDown")) : whole(sample)};
    });
    S3Tier tier(config_of(server.port()), Clock::system(), nullptr);
    EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes()) << trouble;
    EXPECT_EQ(attempts, 3);
  }
}

TEST(S3TierFaults, TriesAgainAfterCutAndShortAnswersAndNeverServesThem) {
  const SampleObject sample(1, 4, {8192});
  const std::string full = whole(sample);
  for (const std::string& broken : {std::string(), std::string("HTTP/1.1 206 Par"), full.substr(0, full.size() - 100),
                                    std::string("\x01\x02garbage\r\n\r\n")}) {
    std::atomic<int> attempts = 0;
    FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
      if (++attempts < 3) return {.text = broken, .cut = true};
      return {.text = full};
    });
    S3Tier tier(config_of(server.port()), Clock::system(), nullptr);
    EXPECT_EQ(read(tier, sample.hit()).value(), sample.bytes()) << broken.substr(0, 20);
    EXPECT_EQ(attempts, 3);
  }
}

TEST(S3TierFaults, GivesUpAtTheDeadline) {
  const SampleObject sample(1, 4, {8192});
  std::atomic<int> attempts = 0;
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
    ++attempts;
    return {.text = FakeHttp::respond("503 Slow Down", error_body("SlowDown"))};
  });
  auto config = config_of(server.port());
  config.find_timeout_ns = config.read_timeout_ns = config.write_timeout_ns = 100 * kMs;
  S3Tier tier(config, Clock::system(), nullptr);
  const auto status = read(tier, sample.hit()).error();
  EXPECT_EQ(status.code(), Code::kUnavailable);
  EXPECT_NE(status.message().find("SlowDown"), std::string::npos) << status.message();
  EXPECT_GT(attempts, 1);
  EXPECT_EQ(write(tier, sample).code(), Code::kUnavailable);
  EXPECT_EQ(find(tier, {sample.query()}).error().code(), Code::kUnavailable);
}

TEST(S3TierFaults, DoesNotTryAgainWhatIsForbidden) {
  const SampleObject sample(1, 4, {8192});
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
    return {.text = FakeHttp::respond("403 Forbidden", error_body("SignatureDoesNotMatch"))};
  });
  S3Tier tier(config_of(server.port()), Clock::system(), nullptr);
  const auto status = read(tier, sample.hit()).error();
  EXPECT_EQ(status.code(), Code::kUnavailable);
  EXPECT_NE(status.message().find("clock"), std::string::npos) << status.message();
  EXPECT_EQ(server.seen().size(), 1U);
}

TEST(S3TierFaults, ASilentServerEndsInTime) {
  const SampleObject sample(1, 4, {8192});
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer { return {.text = "", .stall = true}; });
  auto config = config_of(server.port());
  config.find_timeout_ns = config.read_timeout_ns = config.write_timeout_ns = 150 * kMs;
  config.attempt_timeout_ns = 50 * kMs;
  S3Tier tier(config, Clock::system(), nullptr);
  EXPECT_EQ(find(tier, {sample.query()}).error().code(), Code::kUnavailable);
  EXPECT_EQ(read(tier, sample.hit()).error().code(), Code::kUnavailable);
  EXPECT_EQ(write(tier, sample).code(), Code::kUnavailable);
}

TEST(S3TierFaults, AFindServesWhatItKnowsWhenItsTimeIsOver) {
  const SampleObject sample(1, 1, {8192});
  const SampleObject slow(2, 1, {8192});
  FakeHttp server([&](const FakeHttp::Request& request) -> FakeHttp::Answer {
    if (request.line.find(slow.key.last_block.to_hex()) != std::string::npos) return {.text = "", .stall = true};
    return {.text = "HTTP/1.1 200 OK\r\nContent-Length: 8192\r\n\r\n"};
  });
  auto config = config_of(server.port());
  config.find_timeout_ns = 500 * kMs;
  S3Tier tier(config, Clock::system(), nullptr);
  const auto hits = find(tier, {sample.query(), slow.query()});
  ASSERT_TRUE(hits) << hits.error().to_string();
  EXPECT_EQ(hits->at(0).bytes, 8192U);
  EXPECT_EQ(hits->at(1).bytes, 0U);
}

TEST(S3TierFaults, OddAnswersAreErrorsOrMisses) {
  const SampleObject sample(1, 4, {8192});
  const auto code_of = [&](const std::string& answer) {
    FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer { return {.text = answer, .cut = true}; });
    auto config = config_of(server.port());
    config.read_timeout_ns = 100 * kMs;
    S3Tier tier(config, Clock::system(), nullptr);
    const auto bytes = read(tier, sample.hit());
    return bytes ? Code::kOk : bytes.error().code();
  };
  const std::string text = text_of(sample);
  EXPECT_EQ(code_of(whole(sample)), Code::kOk);
  EXPECT_EQ(code_of(FakeHttp::respond("404 Not Found", error_body("NoSuchKey"))), Code::kNotFound);
  EXPECT_EQ(code_of(FakeHttp::respond("416 Range Not Satisfiable", error_body("InvalidRange"))), Code::kNotFound);
  EXPECT_EQ(code_of(FakeHttp::respond("200 OK", text)), Code::kUnavailable) << "a server that ignores ranges";
  EXPECT_EQ(code_of(FakeHttp::respond("206 Partial Content", text)), Code::kUnavailable) << "a range that is not named";
  EXPECT_EQ(code_of(FakeHttp::respond("206 Partial Content", text + "x", "Content-Range: bytes 0-8192/8192\r\n")),
            Code::kUnavailable);
  EXPECT_EQ(
      code_of(FakeHttp::respond("206 Partial Content", text.substr(0, 4096), "Content-Range: bytes 0-4095/8192\r\n")),
      Code::kUnavailable);
  EXPECT_EQ(code_of(FakeHttp::respond("206 Partial Content", text, "Content-Range: bytes 0-8191/12288\r\n")),
            Code::kNotFound);
  EXPECT_EQ(code_of(FakeHttp::respond("301 Moved Permanently", "", "Location: http://elsewhere/\r\n")),
            Code::kUnavailable);
}

TEST(S3TierFaults, SizesThatNoObjectHasAreMisses) {
  const SampleObject sample(1, 1, {8192});
  for (const char* length : {"0", "8191", "-5", "x", "99999999999999999999999"}) {
    FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
      return {.text = std::string("HTTP/1.1 200 OK\r\nContent-Length: ") + length + "\r\n\r\n", .cut = true};
    });
    auto config = config_of(server.port());
    config.find_timeout_ns = 100 * kMs;
    S3Tier tier(config, Clock::system(), nullptr);
    EXPECT_FALSE(has(tier, sample)) << length;
  }
}

/// An upload of 12 MiB in parts of 5, against a server that fails at one step.
struct Upload {
  Upload(const std::string& step, const std::string& answer) {
    const SampleObject sample(1, 4, {12 << 20});
    FakeHttp server([&](const FakeHttp::Request& request) -> FakeHttp::Answer {
      const std::string what = step_of(request);
      if (what == "part") ++parts;
      if (what == "abort") given_up.set_value();
      if (what == step) return {.text = answer};
      if (what == "look") return {.text = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"};
      if (what == "start") return {.text = FakeHttp::respond("200 OK", "<R><UploadId>up/1</UploadId></R>")};
      return {.text = FakeHttp::respond("200 OK", "", "ETag: \"e\"\r\n")};
    });
    auto config = config_of(server.port());
    config.part_bytes = 5 << 20;
    S3Tier tier(config, Clock::system(), nullptr);
    status = write(tier, sample);
    if (!status && (step == "part" || step == "end")) wait_for(given_up.get_future());
  }

  static std::string step_of(const FakeHttp::Request& request) {
    const auto has = [&](std::string_view text) { return request.line.find(text) != std::string::npos; };
    if (request.line.starts_with("HEAD")) return "look";
    if (has("POST") && has("uploads=")) return "start";
    if (has("PUT") && has("partNumber=") && has("uploadId=up%2F1")) return "part";
    if (has("POST") && has("uploadId=up%2F1")) return "end";
    if (has("DELETE") && has("uploadId=up%2F1")) return "abort";
    return "other";
  }

  Status status;
  std::atomic<int> parts = 0;
  std::promise<void> given_up;
};

TEST(S3TierFaults, AnUploadInPartsSucceedsOrIsGivenUp) {
  const Upload good("none", "");
  EXPECT_TRUE(good.status) << good.status.to_string();
  EXPECT_EQ(good.parts, 3);
  const auto forbidden = FakeHttp::respond("403 Forbidden", error_body("AccessDenied"));
  EXPECT_EQ(Upload("start", forbidden).status.code(), Code::kUnavailable);
  EXPECT_EQ(Upload("start", FakeHttp::respond("200 OK", "<R/>")).status.code(), Code::kUnavailable);
  EXPECT_EQ(Upload("part", forbidden).status.code(), Code::kUnavailable);
  const Upload end("end", FakeHttp::respond("200 OK", error_body("InternalError")));
  EXPECT_EQ(end.status.code(), Code::kUnavailable);
  EXPECT_NE(end.status.message().find("InternalError"), std::string::npos);
}

TEST(S3TierFaults, ACancelledReadEndsAtOnceAndItsMemoryIsLeftAlone) {
  const SampleObject sample(1, 4, {1 << 20});
  std::promise<void> asked;
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
    asked.set_value();
    return {.text = "", .stall = true};
  });
  S3Tier tier(config_of(server.port()), Clock::system(), nullptr);
  const AlignedBytes memory(1 << 20);
  std::stop_source cancel;
  std::promise<Status> ended;
  tier.read(sample.hit(), 0, memory.span(), cancel.get_token(),
            [&](Status status) { ended.set_value(std::move(status)); });
  asked.get_future().wait();
  cancel.request_stop();
  EXPECT_EQ(wait_for(ended.get_future()).code(), Code::kExpired);
}

TEST(S3TierFaults, EveryOperationEndsOnceWhenTheTierGoes) {
  const SampleObject sample(1, 4, {1 << 20});
  FakeHttp server([&](const FakeHttp::Request& request) -> FakeHttp::Answer {
    // Some hang, others are about to try again.
    if (request.line.starts_with("GET")) return {.text = FakeHttp::respond("503 Slow Down")};
    return {.text = "", .stall = true};
  });
  auto config = config_of(server.port());
  config.retries = {.first_pause_ns = 10'000 * kMs, .max_pause_ns = 10'000 * kMs};
  config.concurrent_probes = config.concurrent_reads = config.concurrent_writes = config.concurrent_erases = 2;
  const AlignedBytes memory(1 << 20);
  std::vector<std::atomic<int>> ends(500);
  std::atomic<int> good = 0;
  {
    S3Tier tier(config, Clock::system(), nullptr);
    for (std::size_t i = 0; i < 500; i += 5) {
      const auto done = [&ends, &good, i](std::size_t which) {
        return [&ends, &good, i, which](const auto& result) {
          ++ends[i + which];
          good += static_cast<bool>(result) ? 1 : 0;
        };
      };
      tier.find({sample.query()}, {}, done(0));
      tier.read(sample.hit(), 0, memory.span(), {}, done(1));
      tier.write(sample.object(), done(2));
      tier.erase(std::vector<ChunkKey>(100, sample.key), done(3));
      tier.erase_all(NamespaceSet::all(), done(4));
    }
  }
  for (const auto& each : ends) EXPECT_EQ(each, 1);
  EXPECT_EQ(good, 0);
}

TEST(S3TierRequests, CarryTheTokenAndTheBucketWhereItBelongs) {
  const SampleObject sample(1, 1, {8192});
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
    return {.text = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"};
  });
  auto config = config_of(server.port());
  config.bucket.session_token = {.value = "token"};
  EXPECT_FALSE(has(*std::make_unique<S3Tier>(config, Clock::system(), nullptr), sample));
  config.bucket.endpoint = "http://localhost:" + std::to_string(server.port());
  config.bucket.path_style = false;
  EXPECT_FALSE(has(*std::make_unique<S3Tier>(config, Clock::system(), nullptr), sample));
  const auto requests = server.seen();
  ASSERT_EQ(requests.size(), 2U);
  EXPECT_TRUE(requests[0].line.starts_with("HEAD /bucket/kvern/v1.1/01010101")) << requests[0].line;
  EXPECT_EQ(requests[0].header("x-amz-security-token"), "token");
  EXPECT_NE(requests[0].header("authorization").find("x-amz-security-token"), std::string::npos);
  EXPECT_TRUE(requests[1].line.starts_with("HEAD /kvern/v1.1/01010101")) << requests[1].line;
  EXPECT_EQ(requests[1].header("Host"), "bucket.localhost:" + std::to_string(server.port()));
}

TEST(S3TierRequests, ReadNewSecretsFromFilesAfterARefusal) {
  const SampleObject sample(1, 1, {8192});
  FakeHttp server([&](const FakeHttp::Request&) -> FakeHttp::Answer {
    return {.text = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"};
  });
  auto config = config_of(server.port());
  const auto file = std::filesystem::temp_directory_path() / ("kvern-key-" + std::to_string(::getpid()));
  std::ofstream(file) << "first\n";
  config.bucket.access_key_id = {.file = file.string()};
  S3Tier tier(config, Clock::system(), nullptr);
  static_cast<void>(has(tier, sample));
  std::ofstream(file) << "second\n";
  static_cast<void>(has(tier, sample));
  static_cast<void>(has(tier, sample));
  std::filesystem::remove(file);
  const auto requests = server.seen();
  EXPECT_NE(requests.front().header("authorization").find("Credential=first/"), std::string::npos);
  EXPECT_NE(requests.back().header("authorization").find("Credential=second/"), std::string::npos);
}

TEST(S3TierConfig, SaysWhatIsWrong) {
  const auto message = [](auto change) {
    auto config = config_of(1);
    change(config);
    return config.validate().message();
  };
  EXPECT_EQ(message([](S3TierConfig&) {}), "");
  EXPECT_NE(message([](S3TierConfig& c) { c.bucket.endpoint = "host:1"; }).find("scheme"), std::string::npos);
  EXPECT_NE(message([](S3TierConfig& c) { c.bucket.endpoint = "ftp://host"; }).find("https"), std::string::npos);
  EXPECT_NE(message([](S3TierConfig& c) { c.bucket.endpoint = "http://u:p@host"; }).find("plain host"),
            std::string::npos);
  EXPECT_NE(message([](S3TierConfig& c) { c.bucket.bucket = "A/b"; }).find("bucket"), std::string::npos);
  EXPECT_NE(message([](S3TierConfig& c) { c.bucket.access_key_id = {}; }).find("access_key_id"), std::string::npos);
  EXPECT_NE(message([](S3TierConfig& c) { c.part_bytes = 1 << 20; }).find("5 MiB"), std::string::npos);
  auto config = config_of(1);
  config.bucket.secret_access_key = {.environment = "KVERN_NO_SUCH_VARIABLE"};
  EXPECT_THROW(S3Tier(config, Clock::system(), nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace kvern::testing
