#include "store/s3_tier.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "tests/integration/s3_server.h"
#include "tests/store/tier_samples.h"

namespace kvern::testing {
namespace {

constexpr std::size_t kMiB = 1U << 20;

/// One server for all tests: it takes seconds to start. Each test uses namespaces or a prefix of its own.
class S3TierOnAServer : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { server = std::make_unique<S3Server>(); }
  static void TearDownTestSuite() { server.reset(); }
  void SetUp() override {
    ASSERT_TRUE(server->ready()) << server->text();
    config = server->config();
    config.prefix = std::string("kvern/") + ::testing::UnitTest::GetInstance()->current_test_info()->name();
    // moto takes its time on a busy machine.
    config.find_timeout_ns = config.read_timeout_ns = config.write_timeout_ns = 30'000'000'000;
    config.breaker.stall_ns = 60'000'000'000;
  }
  std::unique_ptr<S3Tier> make_tier() const { return std::make_unique<S3Tier>(config, Clock::system(), nullptr); }

  static std::unique_ptr<S3Server> server;
  S3TierConfig config;
};
std::unique_ptr<S3Server> S3TierOnAServer::server;

TEST_F(S3TierOnAServer, GivesBackWhatWasWritten) {
  const auto tier = make_tier();
  std::vector<SampleObject> samples;
  samples.emplace_back(1, 4, std::vector<std::size_t>{4096});
  samples.emplace_back(2, 4, std::vector<std::size_t>{4096, 8192, kMiB});
  for (const auto& sample : samples) {
    EXPECT_FALSE(has(*tier, sample));
    const auto written = write(*tier, sample);
    ASSERT_TRUE(written) << written.to_string();
    const auto hits = find(*tier, {sample.query()});
    ASSERT_TRUE(hits) << hits.error().to_string();
    EXPECT_EQ(hits->front().key, sample.key);
    EXPECT_EQ(hits->front().bytes, sample.bytes().size());
    const auto bytes = read(*tier, hits->front());
    ASSERT_TRUE(bytes) << bytes.error().to_string();
    EXPECT_EQ(*bytes, sample.bytes());
  }
}

TEST_F(S3TierOnAServer, UploadsLargeObjectsInParts) {
  config.part_bytes = 5 * kMiB;
  const auto tier = make_tier();
  const SampleObject sample(1, 4, {7 * kMiB, 4096, 6 * kMiB});
  const auto written = write(*tier, sample);
  ASSERT_TRUE(written) << written.to_string();
  EXPECT_EQ(read(*tier, sample.hit()).value(), sample.bytes());
}

TEST_F(S3TierOnAServer, ReadsAnyRange) {
  const auto tier = make_tier();
  const SampleObject sample(1, 4, {kMiB, kMiB + 4096});
  const auto whole = sample.bytes();
  ASSERT_TRUE(write(*tier, sample));
  for (const auto& [offset, bytes] :
       std::vector<std::pair<std::size_t, std::size_t>>{{0, 4096}, {4096, kMiB}, {2 * kMiB, 4096}}) {
    const auto part = read(*tier, sample.hit(), offset, bytes);
    ASSERT_TRUE(part) << offset << ": " << part.error().to_string();
    EXPECT_TRUE(std::equal(part->begin(), part->end(), whole.begin() + static_cast<std::ptrdiff_t>(offset)));
  }
}

TEST_F(S3TierOnAServer, FindsTheLastBlocksThatItIsToldToTry) {
  config.probes_per_cell = 2;
  const auto tier = make_tier();
  const SampleObject two(1, 2, {4096});
  const SampleObject three(1, 3, {8192});
  ASSERT_TRUE(write(*tier, two));
  ASSERT_TRUE(write(*tier, three));
  const auto hits = find(*tier, {SampleObject(1, 3, {4096}).query(), SampleObject(1, 4, {4096}).query(),
                                 SampleObject(1, 5, {4096}).query(), SampleObject(2, 3, {4096}).query()});
  ASSERT_TRUE(hits) << hits.error().to_string();
  EXPECT_EQ((*hits)[0].blocks, 3U);
  EXPECT_EQ((*hits)[1].blocks, 3U);
  EXPECT_EQ((*hits)[1].bytes, 8192U);
  EXPECT_EQ((*hits)[2].bytes, 0U);
  EXPECT_EQ((*hits)[3].bytes, 0U);
}

TEST_F(S3TierOnAServer, SharesItsObjectsWithOtherDaemonsAndAfterARestart) {
  const SampleObject sample(1, 4, {kMiB + 4096});
  ASSERT_TRUE(write(*make_tier(), sample));
  EXPECT_EQ(read(*make_tier(), sample.hit()).value(), sample.bytes());
  config.prefix += "/another";
  EXPECT_FALSE(has(*make_tier(), sample));
}

TEST_F(S3TierOnAServer, TwoWritersOfOneKeyLeaveOneOfTheTwoObjects) {
  const auto tier = make_tier();
  const auto other = make_tier();
  const SampleObject mine(1, 4, {2 * kMiB}, 1);
  const SampleObject theirs(1, 4, {2 * kMiB}, 2);
  std::promise<Status> first;
  std::promise<Status> second;
  tier->write(mine.object(), [&](Status status) { first.set_value(std::move(status)); });
  other->write(theirs.object(), [&](Status status) { second.set_value(std::move(status)); });
  EXPECT_TRUE(wait_for(first.get_future()));
  EXPECT_TRUE(wait_for(second.get_future()));
  const auto bytes = read(*tier, mine.hit()).value();
  EXPECT_TRUE(bytes == mine.bytes() || bytes == theirs.bytes());
}

TEST_F(S3TierOnAServer, AnObjectOfAnotherSizeReplacesTheOldOneAndIsNotReadAsIt) {
  const auto tier = make_tier();
  const SampleObject old(1, 4, {kMiB}, 1);
  const SampleObject smaller(1, 4, {8192}, 2);
  ASSERT_TRUE(write(*tier, old));
  ASSERT_TRUE(write(*tier, smaller));
  EXPECT_EQ(read(*tier, old.hit()).error().code(), Code::kNotFound);
  EXPECT_EQ(read(*tier, old.hit(), kMiB / 2, 4096).error().code(), Code::kNotFound);
  EXPECT_EQ(read(*tier, smaller.hit()).value(), smaller.bytes());
}

TEST_F(S3TierOnAServer, ErasesKeys) {
  const auto tier = make_tier();
  const SampleObject first(1, 4, {4096});
  const SampleObject second(2, 4, {4096});
  for (const auto* sample : {&first, &second}) ASSERT_TRUE(write(*tier, *sample));
  EXPECT_TRUE(erase(*tier, {first.key, SampleObject(77, 1, {4096}).key}));
  EXPECT_FALSE(has(*tier, first));
  EXPECT_EQ(read(*tier, first.hit()).error().code(), Code::kNotFound);
  EXPECT_TRUE(has(*tier, second));
}

TEST(S3TierOnAServerThatIgnoresSignatures, ErasesNamespacesOfMoreThanAPage) {
  const S3Server server(S3Server::Signatures::kIgnored);
  ASSERT_TRUE(server.ready()) << server.text();
  auto config = server.config();
  config.find_timeout_ns = config.write_timeout_ns = config.write_queue_age_ns = 60'000'000'000;
  config.concurrent_writes = 16;
  S3Tier tier(config, Clock::system(), nullptr);
  std::vector<SampleObject> samples;
  for (std::uint64_t prompt = 0; prompt < 1010; ++prompt)
    samples.emplace_back(prompt, 1, std::vector<std::size_t>{4096});
  std::atomic<int> good = 0;
  for (const auto& sample : samples) tier.write(sample.object(), [&](const Status& status) { good += status.is_ok(); });
  ASSERT_TRUE(tier.drain(100'000'000'000));
  ASSERT_EQ(good, 1010);
  const SampleObject foreign(3, 4, {4096}, 0, 9);
  ASSERT_TRUE(write(tier, foreign));
  EXPECT_EQ(list(tier, NamespaceSet::all()).size(), 1011U) << "two pages";
  EXPECT_EQ(list(tier, foreign.key.namespace_id), (Sizes{{foreign.key.to_string(), 4096}}));
  const auto erased = erase_all(tier, sample_namespace(1));
  EXPECT_TRUE(erased) << erased.to_string();
  for (const auto& sample : {samples.front(), samples[500], samples.back()}) EXPECT_FALSE(has(tier, sample));
  EXPECT_TRUE(has(tier, foreign));
  EXPECT_TRUE(erase_all(tier, NamespaceSet::all()));
  EXPECT_FALSE(has(tier, foreign));
}

TEST_F(S3TierOnAServer, ChecksTheServersCertificate) {
  config.bucket.endpoint = server->tls_config().bucket.endpoint;
  config.ca_file = server->tls_config().ca_file;
  const SampleObject sample(1, 4, {8192, kMiB});
  {
    const auto tier = make_tier();
    const auto written = write(*tier, sample);
    ASSERT_TRUE(written) << written.to_string();
    EXPECT_EQ(read(*tier, sample.hit()).value(), sample.bytes());
  }
  config.ca_file.clear();  // the system's authorities do not know this one
  config.write_timeout_ns = config.read_timeout_ns = 3'600'000'000'000;  // nothing that is tried again
  const auto stranger = make_tier();
  const auto refused = write(*stranger, SampleObject(2, 4, {4096}));
  EXPECT_EQ(refused.code(), Code::kUnavailable);
  EXPECT_NE(refused.message().find("certificate"), std::string::npos) << refused.message();
  EXPECT_EQ(read(*stranger, sample.hit()).error().code(), Code::kUnavailable);
  config.ca_file = "/nowhere/nothing.pem";
  EXPECT_THROW(make_tier(), std::invalid_argument);
}

TEST_F(S3TierOnAServer, TakesTemporaryCredentialsWithTheirToken) {
  const auto prefix = config.prefix;
  config = server->session_config();
  config.prefix = prefix;
  const auto tier = make_tier();
  const SampleObject sample(1, 4, {8192});
  const auto written = write(*tier, sample);
  EXPECT_TRUE(written) << written.to_string();
  EXPECT_EQ(read(*tier, sample.hit()).value(), sample.bytes());
}

TEST_F(S3TierOnAServer, AWrongSecretIsRefusedAndTheErrorSaysWhatToCheckAndNoSecret) {
  config.bucket.secret_access_key = {.value = "hidden/0123456789012345678901234567890123"};
  const auto tier = make_tier();
  const auto written = write(*tier, SampleObject(1, 4, {4096}));
  EXPECT_EQ(written.code(), Code::kUnavailable);
  EXPECT_NE(written.message().find("403"), std::string::npos) << written.message();
  EXPECT_NE(written.message().find("clock"), std::string::npos) << written.message();
  EXPECT_EQ(written.message().find("hidden"), std::string::npos) << written.message();
}

}  // namespace
}  // namespace kvern::testing
