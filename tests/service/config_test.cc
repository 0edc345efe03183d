#include "service/config.h"
#include "service/terms.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace kvern {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& text) {
    path_ = (std::filesystem::temp_directory_path() / "kvern-config-XXXXXX").string();
    const int fd = ::mkstemp(path_.data());
    EXPECT_GE(fd, 0);
    ::close(fd);
    std::ofstream(path_) << text;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Config, AnEmptyFileIsTheDefaults) {
  const auto loaded = parse_config("", "f");
  EXPECT_THAT(loaded.errors, IsEmpty());
  EXPECT_EQ(loaded.config.store.dram_bytes, 4ULL << 30);
  EXPECT_EQ(loaded.config.codec.fallback, "raw");
  EXPECT_FALSE(loaded.config.server.socket.empty());
  EXPECT_THAT(loaded.config.server.run_dir, StartsWith("/dev/shm/kvern-"));
}

TEST(Config, KeysAreReadFromTheirSections) {
  const auto loaded = parse_config(
      "[server]\nsocket = \"/tmp/a.sock\"\ninsecure = true\n[store]\ndram_bytes = \"512 MiB\"\n"
      "[sessions]\nstaging_bytes_max = 65536\ntimeout_ms = 5000\n",
      "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  EXPECT_EQ(loaded.config.server.socket, "/tmp/a.sock");
  EXPECT_TRUE(loaded.config.server.insecure);
  EXPECT_EQ(loaded.config.store.dram_bytes, 512ULL << 20);
  EXPECT_EQ(loaded.config.sessions.staging_bytes_max, 65536U);
  EXPECT_EQ(loaded.config.sessions.timeout_ms, 5000U);
  EXPECT_EQ(loaded.config.admission_path(), "/tmp/a.sock.fds");
}

TEST(Config, EveryErrorIsToldWithFileAndLine) {
  const auto loaded = parse_config(
      "[store]\n"                // 1
      "dram_bytes = \"lots\"\n"  // 2
      "eviction = \"magic\"\n"   // 3
      "dram = 3\n"               // 4
      "[server]\n"               // 5
      "insecure = \"yes\"\n"     // 6
      "ucx_port = 70000\n"       // 7
      "[kitchen]\n"              // 8
      "[[namespace]]\n"          // 9
      "codec = \"zip\"\n",       // 10
      "k.toml");
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:2: store.dram_bytes")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:3: store.eviction must be one of reuse|lru")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:4: there is no key store.dram;")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:6: server.insecure must be true or false")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:7: server.ucx_port must be from 0 to 65535")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:8: there is no section kitchen")));
  EXPECT_THAT(loaded.errors, Contains(StartsWith("k.toml:10: ")));
  EXPECT_EQ(loaded.errors.size(), 7U) << ::testing::PrintToString(loaded.errors);
}

TEST(Config, WhatIsNoTomlIsToldWithItsLine) {
  EXPECT_THAT(parse_config("[store]\n\ndram_bytes = = 3\n", "k.toml").errors, ElementsAre(StartsWith("k.toml:3: ")));
}

TEST(Config, FlagsWinOverEnvironmentOverFileOverDefault) {
  const TemporaryFile file("[pipeline]\nmax_queued = 1\nencode_threads = 1\n[log]\nlevel = \"warn\"\n");
  const auto loaded = load_config({.file = file.path(),
                                   .environment = {{"KVERN_PIPELINE_MAX_QUEUED", "2"},
                                                   {"KVERN_PIPELINE_ENCODE_THREADS", "2"},
                                                   {"KVERN_GOLDEN", "no key of ours"}},
                                   .flags = {{"pipeline.max_queued", "3"}}});
  ASSERT_THAT(loaded.errors, IsEmpty());
  EXPECT_EQ(loaded.config.pipeline.max_queued, 3U);
  EXPECT_EQ(loaded.config.pipeline.encode_threads, 2U);
  EXPECT_EQ(loaded.config.log.level, "warn");
  EXPECT_EQ(loaded.config.pipeline.ring_spin_us, ServiceConfig().pipeline.ring_spin_us);
}

TEST(Config, ErrorsOfEnvironmentAndFlagsNameTheirSource) {
  const auto loaded = load_config(
      {.file = std::nullopt, .environment = {{"KVERN_LOG_LEVEL", "loud"}}, .flags = {{"pipeline.max_queued", "many"}}});
  EXPECT_THAT(loaded.errors, ElementsAre(StartsWith("environment variable KVERN_LOG_LEVEL: log.level"),
                                         StartsWith("--pipeline.max_queued: ")));
}

TEST(Config, AFileThatIsNotThereIsAnError) {
  const auto loaded = load_config({.file = "/nowhere/kvernd.toml", .environment = {}, .flags = {}});
  EXPECT_THAT(loaded.errors, ElementsAre(StartsWith("/nowhere/kvernd.toml: cannot be read")));
}

TEST(Config, ContradictionsAreRefused) {
  const std::pair<const char*, const char*> wrong[] = {
      {"[server]\ntcp_listen = \"*:7070\"\n", "server_key_file"},
      {"[server]\ntcp_listen = \"tcp://*:7070\"\ninsecure = true\n", "must be host:port"},
      {"[server]\ntcp_listen = \"*:7070\"\nserver_key_file = \"k\"\n", "allowed_clients_file"},
      {"[server]\ndata_plane = \"ucx\"\n", "ucx_listen"},
      {"[server]\nsocket_mode = \"rw\"\n", "socket_mode"},
      {"[sessions]\ntimeout_ms = 1000\nheartbeat_interval_ms = 900\n", "timeout_ms"},
      {"[store]\nindex_slots = 1000\n", "power of two"},
      {"[codec]\ndefault = \"zip\"\n", "codec.default"},
      {"[codec]\ndefault = \"cake | int8\"\n", "compact caches"},
      {"[codec]\nprofiles = \"/nowhere\"\n", "codec.profiles must be a folder"},
      {"[codec]\ndefault = \"zstd | int8\"\n", "int8 comes before zstd"},
      {"[metrics]\nlisten = \"9464\"\n", "host:port"},
      {"[tracing]\nendpoint = \"collector:4318\"\n", "tracing.endpoint must be http://"},
      {"[tracing]\nendpoint = \"http://\"\n", "tracing.endpoint must be http://"},
      {"[tracing]\nendpoint = \"http:///v1/traces\"\n", "tracing.endpoint must be http://"},
      {"[tracing]\nendpoint = \"http://a b\"\n", "tracing.endpoint must be http://"},
      {"[tracing]\nendpoint = \"http://a:4318\"\nservice_name = \"\"\n", "tracing.service_name"},
      {"[tracing]\nqueue_spans = 0\n", "tracing.queue_spans"}};
  for (const auto& [text, said] : wrong) {
    EXPECT_THAT(parse_config(text, "f").errors, ElementsAre(HasSubstr(said))) << text;
  }
  const std::string long_path = "[server]\nsocket = \"/" + std::string(104, 'x') + "\"\n";
  EXPECT_THAT(parse_config(long_path, "f").errors, ElementsAre(HasSubstr("too long")));
  EXPECT_THAT(parse_config("[server]\ntcp_listen = \"*:7070\"\ninsecure = true\n", "f").errors, IsEmpty());
}

TEST(Config, AnEndpointWithoutAPathMeansTheOneOfOtlp) {
  ServiceConfig::Tracing tracing;
  for (const auto& [endpoint, url] :
       {std::pair("http://a:4318", "http://a:4318/v1/traces"), std::pair("https://a/", "https://a/v1/traces"),
        std::pair("http://a:4318/otlp/v1/traces", "http://a:4318/otlp/v1/traces")}) {
    tracing.endpoint = endpoint;
    EXPECT_EQ(tracing.url(), url);
  }
}

TEST(Config, TheDumpSaysTheSameAgain) {
  auto loaded = parse_config(
      "[server]\nsocket = \"/tmp/x.sock\"\n[store]\ndram_bytes = \"3GiB\"\n"
      "[[namespace]]\nmatch = { model = \"llama*\", tenant = \"default\" }\ncodec = \"int8\"\n",
      "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  const std::string dump = dump_config(loaded.config);
  const auto again = parse_config(dump, "dump");
  EXPECT_THAT(again.errors, IsEmpty());
  for (const ConfigKey& key : config_keys()) EXPECT_EQ(key.get(again.config), key.get(loaded.config)) << key.name;
  EXPECT_EQ(dump_config(again.config), dump);
}

TEST(Config, AChainMayNeedFactsThatOnlyANamespaceKnows) {
  EXPECT_THAT(parse_config("[codec]\ndefault = \"unrotate | int8 | zstd\"\n", "f").errors, IsEmpty());
}

TEST(Config, TheFirstRuleThatFitsChoosesTheCodec) {
  const auto loaded = parse_config(
      "[codec]\ndefault = \"raw\"\n"
      "[[namespace]]\nmatch = { model = \"*-exact\" }\ncodec = \"raw\"\n"
      "[[namespace]]\nmatch = { model = \"llama*\" }\ncodec = \"int8\"\n",
      "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  const auto codec_of = [&](const char* model) {
    return namespace_terms(loaded.config, {{"model", model}, {"tenant", "default"}}).value().codec_spec;
  };
  EXPECT_EQ(codec_of("llama-exact"), "raw");
  EXPECT_EQ(codec_of("llama-8b"), "int8");
  EXPECT_EQ(codec_of("qwen"), "raw");
}

TEST(Config, LaddersAndFloorsComeFromTheNamespaceThenTheTenantThenTheDefault) {
  const auto loaded = parse_config(
      "[ladder]\ndefault = \"balanced\"\n"
      "[[namespace]]\nmatch = { model = \"exact\" }\ncodec = \"raw\"\n"
      "[[namespace]]\nmatch = { model = \"small\" }\nladder = \"compact\"\nmax_relative_error = 0.2\n"
      "[[tenant]]\nname = \"strict*\"\nmax_relative_error = 0.01\n"
      "[[tenant]]\nname = \"batch\"\nladder = \"compact\"\n",
      "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  EXPECT_TRUE(loaded.config.has_ladders());
  const auto terms = [&](const char* model, const char* tenant) {
    return namespace_terms(loaded.config, {{"model", model}, {"tenant", tenant}}).value();
  };
  const auto rungs = [&](const char* model, const char* tenant) {
    const auto of = terms(model, tenant);
    return of.storage.ladder ? of.storage.ladder->rungs().size() : 0;
  };
  EXPECT_EQ(terms("any", "default").codec_spec, "int8r");
  EXPECT_EQ(rungs("any", "default"), 2U);
  EXPECT_EQ(rungs("any", "batch"), 4U);
  EXPECT_EQ(rungs("exact", "batch"), 0U) << "a codec that is named stays";
  EXPECT_EQ(terms("exact", "batch").codec_spec, "raw");
  EXPECT_EQ(rungs("small", "default"), 3U) << "its floor cuts the last rung off";
  EXPECT_EQ(rungs("any", "strict-one"), 1U);
  EXPECT_EQ(rungs("small", "strict-one"), 1U) << "the stricter floor holds";
  EXPECT_EQ(terms("small", "strict-one").storage.max_relative_error, 0.01);
  EXPECT_EQ(terms("exact", "strict-one").codec_spec, "raw") << "loses nothing";
  const std::string dump = dump_config(loaded.config);
  EXPECT_EQ(dump_config(parse_config(dump, "dump").config), dump);
  EXPECT_FALSE(ServiceConfig().has_ladders());
  EXPECT_EQ(ServiceConfig().demotion_free_bytes(), 0U);
}

TEST(Config, QuotasAreBytesOrAShareAndTheSmallerHolds) {
  const auto loaded = parse_config(
      "[store]\ndram_bytes = \"8GiB\"\n"
      "[[tenant]]\nname = \"a\"\ndram_bytes = \"1GiB\"\n"
      "[[tenant]]\nname = \"b\"\ndram_share = 0.25\n"
      "[[tenant]]\nname = \"c\"\ndram_share = 0.5\ndram_bytes = \"3GiB\"\n",
      "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  const auto bytes_of = [&](const char* tenant) {
    return namespace_terms(loaded.config, {{"tenant", tenant}}).value().storage.tenant_bytes;
  };
  EXPECT_EQ(bytes_of("a"), 1ULL << 30);
  EXPECT_EQ(bytes_of("b"), 2ULL << 30);
  EXPECT_EQ(bytes_of("c"), 3ULL << 30);
  EXPECT_EQ(bytes_of("d"), 0U);
  const std::string dump = dump_config(loaded.config);
  EXPECT_EQ(dump_config(parse_config(dump, "dump").config), dump);
  EXPECT_THAT(
      parse_config("[[tenant]]\nname = \"a\"\ndram_bytes = 0\n[[tenant]]\nname = \"b\"\ndram_share = 2\n", "k").errors,
      ElementsAre(StartsWith("k:3: dram_bytes must be above 0"), StartsWith("k:6: dram_share must be")));
}

TEST(Config, AFloorThatTheCodecIsNotKnownToKeepIsRefused) {
  const auto loaded = parse_config(
      "[codec]\ndefault = \"unrotate | int4\"\n[[tenant]]\nname = \"*\"\nmax_relative_error = 0.01\n", "f");
  ASSERT_THAT(loaded.errors, IsEmpty());
  const auto terms = namespace_terms(loaded.config, {{"tenant", "default"}});
  ASSERT_FALSE(terms);
  EXPECT_EQ(terms.error().code(), Code::kRefused);
  EXPECT_NE(terms.error().message().find("unrotate | int4"), std::string::npos);
}

TEST(Config, RulesThatSayTooMuchOrNothingAreToldWithTheirLine) {
  const auto loaded = parse_config(
      "[[namespace]]\ncodec = \"raw\"\nladder = \"compact\"\n"
      "[[namespace]]\nladder = \"steep\"\n"
      "[[namespace]]\nmatch = { model = \"x\" }\n"
      "[[tenant]]\nladder = \"exact\"\n"
      "[[tenant]]\nname = \"a\"\nmax_relative_error = 2\nquota = 3\n",
      "k.toml");
  EXPECT_THAT(loaded.errors, ElementsAre(StartsWith("k.toml:1: a [[namespace]] rule names a codec or a ladder"),
                                         StartsWith("k.toml:5: no ladder is called"),
                                         StartsWith("k.toml:6: the [[namespace]] rule says nothing"),
                                         StartsWith("k.toml:8: the [[tenant]] rule names no tenant"),
                                         StartsWith("k.toml:12: max_relative_error must be"),
                                         StartsWith("k.toml:13: [[tenant]] has no key quota")));
}

TEST(Config, SizesAreReadWithTheirUnits) {
  EXPECT_EQ(parse_bytes("4096").value(), 4096U);
  EXPECT_EQ(parse_bytes("4GiB").value(), 4ULL << 30);
  EXPECT_EQ(parse_bytes("4 KiB").value(), 4096U);
  EXPECT_EQ(parse_bytes("1kB").value(), 1000U);
  for (const char* wrong : {"", "GiB", "-1", "4 gigs", "4.5GiB", "99999999999TiB", " 4"})
    EXPECT_FALSE(parse_bytes(wrong)) << wrong;
  EXPECT_EQ(format_bytes(4ULL << 30), "4GiB");
  EXPECT_EQ(format_bytes(1000), "1000");
}

TEST(Config, DerivedSizesFollowTheTier) {
  ServiceConfig config;
  config.store.dram_bytes = 16ULL << 30;
  EXPECT_EQ(config.chunk_capacity(), 65536U);
  EXPECT_GE(config.index_slots(), 65536U * 16);
  config.store.dram_bytes = 1 << 20;
  EXPECT_EQ(config.chunk_capacity(), 16384U);
}

// Whoever adds a key to a rule must say what it does.
TEST(Config, TheReferenceHasEveryKeyAndEveryKeyOfRules) {
  const std::string reference = config_reference();
  for (const ConfigKey& key : config_keys()) {
    EXPECT_THAT(reference, HasSubstr("| `" + std::string(key.name.substr(key.name.find('.') + 1)) + "` | "))
        << key.name;
    EXPECT_THAT(reference, HasSubstr("### [" + std::string(key.name.substr(0, key.name.find('.'))) + "]\n"));
  }
  for (const std::string array : {"namespace", "tenant"}) {
    const auto at = reference.find("### [[" + array + "]]\n");
    ASSERT_NE(at, std::string::npos);
    std::string known;
    std::istringstream lines(reference.substr(at, reference.find("\n###", at) - at));
    std::vector<std::string> names;
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("| `")) names.push_back(line.substr(3, line.find('`', 3) - 3));
    }
    std::ranges::sort(names);
    for (const auto& name : names) known += (known.empty() ? "" : ", ") + name;
    const auto loaded = parse_config("[[" + array + "]]\nno_such_key = 1\n", "f");
    EXPECT_THAT(loaded.errors, Contains(HasSubstr("it has " + known))) << "the reference and the parser differ";
  }
}

// The file that people copy must be one that the daemon takes, and must name every key.
TEST(Config, TheExampleIsGoodAndComplete) {
  const std::string path = std::string(KVERN_SOURCE_DIR) + "/deploy/kvernd.toml";
  const auto loaded = load_config({.file = path, .environment = {}, .flags = {}});
  EXPECT_THAT(loaded.errors, IsEmpty());
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  for (const ConfigKey& key : config_keys()) {
    EXPECT_THAT(text, HasSubstr(std::string(key.name.substr(key.name.find('.') + 1)) + " = ")) << key.name;
  }
}

}  // namespace
}  // namespace kvern
