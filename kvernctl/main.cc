// kvernctl: looks at, checks and tends a running kvernd.

#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <iostream>
#include <string>

#include "kvernctl/commands.h"
#include "kvernctl/report.h"
#include "kvernctl/top.h"

namespace {

std::string default_address() {
  if (const char* address = std::getenv("KVERN_ADDRESS")) return address;
  // Where kvernd is without [server] socket.
  const char* directory = std::getenv("XDG_RUNTIME_DIR");
  if (directory != nullptr && *directory != '\0') return std::string("unix://") + directory + "/kvern/kvernd.sock";
  // Where engines start one that may not write to /run.
  const std::string of_user = "/tmp/kvern-" + std::to_string(::getuid()) + "/kvernd.sock";
  struct stat about {};
  const bool ours = ::lstat(of_user.c_str(), &about) == 0 && about.st_uid == ::getuid();
  return "unix://" + (ours && ::access("/run/kvern/kvernd.sock", F_OK) != 0 ? of_user : "/run/kvern/kvernd.sock");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Looks at, checks and tends a running kvernd."};
  app.set_version_flag("--version", "kvernctl " KVERN_VERSION);
  app.require_subcommand(1);
  app.footer("Exit code: 0 good, 1 something is wrong (the output says what), 2 the command could not run.");

  kvern::DaemonAddress address;
  address.address = default_address();
  app.add_option("--address", address.address, "unix:///path/to/kvernd.sock or tcp://host:port (also KVERN_ADDRESS)")
      ->capture_default_str();
  app.add_option("--server-key-file", address.server_key_file, "public CURVE key of the daemon, for tcp://");
  app.add_option("--client-key-file", address.client_key_file, "own CURVE key pair, for tcp://");
  app.add_flag("--insecure", address.insecure, "tcp:// without CURVE");
  app.add_option("--timeout-ms", address.timeout_ms, "how long to wait for an answer")->capture_default_str();

  bool json = false;
  auto* status = app.add_subcommand("status", "sessions, tiers, namespaces and rates at this moment");
  status->add_flag("--json", json, "the whole report as one JSON object");

  kvern::TopOptions top_options;
  auto* top = app.add_subcommand("top", "a live view of tiers, codecs, sessions and slowest operations");
  top->add_option("--interval", top_options.interval_seconds, "seconds between readings")
      ->capture_default_str()
      ->check(CLI::Range(0.2, 3600.0));
  top->add_flag("--once", top_options.once, "one screen of text after one interval, for scripts");

  kvern::ReportOptions report_options;
  auto* report = app.add_subcommand("report", "one HTML page about what the cache did over a period");
  auto* since = report->add_option("--since", report_options.since,
                                   "the period begins with this file, a saved /metrics; several: the oldest first");
  report->add_option("--for", report_options.for_seconds, "seconds to look at the daemon from now on, without --since")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 86'400.0))
      ->excludes(since);
  report->add_option("--output", report_options.output, "the file to write")->capture_default_str();
  report
      ->add_option("--prefill", report_options.prefill_tokens_per_second,
                   "prompt tokens that an engine computes a second")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);

  std::string hash;
  auto* explain = app.add_subcommand("explain", "why a block is found or not");
  explain->add_option("hash", hash, "block hash in hexadecimal")->required();

  std::string namespace_hex;
  std::string file;
  std::uint64_t limit = 100;
  auto* inspect = app.add_subcommand("inspect", "what is stored, chunk by chunk; or what a container file holds");
  inspect->add_option("--namespace", namespace_hex, "only this namespace (32 hexadecimal digits)");
  inspect->add_option("--limit", limit, "at most so many chunks")->capture_default_str();
  inspect->add_option("--file", file, "a file with one container");

  kvern::FlushOptions flush_options;
  auto* flush = app.add_subcommand("flush", "drops what is stored, from all tiers");
  auto* what = flush->add_option_group("what");
  // An unset variable of a script must not become everything.
  const CLI::Validator named([](const std::string& text) { return std::string(text.empty() ? "is empty" : ""); }, "");
  auto* of_namespace =
      what->add_option("--namespace", flush_options.namespace_hex, "only this namespace")->check(named);
  auto* of_tenant = what->add_option("--tenant", flush_options.tenant, "only namespaces of this tenant")->check(named);
  auto* prefix = what->add_option(
      "--prefix", flush_options.prefix_hex,
      "only chunks that hold the block of this hash, and those that continue them; reads the start of every object in "
      "lower tiers, which may need a larger --timeout-ms");
  prefix->check(named);
  what->add_flag("--all", flush_options.all, "everything")
      ->excludes(of_namespace)
      ->excludes(of_tenant)
      ->excludes(prefix);
  of_tenant->excludes(of_namespace);
  what->require_option(1, 2);

  std::string compact_handle;
  std::uint32_t compact_wait_seconds = 0;
  auto* compact = app.add_subcommand("compact", "compact caches: prompts cut to fewer slots");
  compact->require_subcommand(1);
  compact->add_subcommand("ls", "all of them");
  auto* compact_show = compact->add_subcommand("show", "what one keeps, and what became of it");
  compact_show->add_option("handle", compact_handle, "kvc1.…")->required();
  compact_show->add_option("--wait", compact_wait_seconds, "so many seconds at most, while it is pending");
  auto* compact_rm = compact->add_subcommand("rm", "deletes one from all tiers");
  compact_rm->add_option("handle", compact_handle, "kvc1.…")->required();

  std::string directory = ".";
  std::string key_name = "kvern";
  auto* keygen = app.add_subcommand("keygen", "makes a CURVE key pair for TCP");
  keygen->add_option("--directory", directory, "where the two files go")->capture_default_str();
  keygen->add_option("--name", key_name, "NAME.key (secret, mode 0600) and NAME.pub are written")
      ->capture_default_str();

  auto* doctor = app.add_subcommand("doctor", "checks the whole path, end to end, and says what is wrong");

  kvern::BenchOptions bench_options;
  auto* bench = app.add_subcommand("bench", "stores and loads through the running daemon, beside memcpy");
  bench->add_option("--chunk-bytes", bench_options.chunk_bytes, "raw bytes of a chunk")->capture_default_str();
  bench->add_option("--total-bytes", bench_options.total_bytes, "bytes to move each way")->capture_default_str();
  bench->add_option("--batch", bench_options.batch, "chunks per request")->capture_default_str();
  bench->add_option("--codec", bench_options.codec, "codec chain")->capture_default_str();

  kvern::plan::PlanOptions plan_options;
  plan_options.codecs = {"exact", "balanced", "compact"};
  std::string trace;
  std::string model;
  std::string chart;
  auto* plan =
      app.add_subcommand("plan", "replays a trace and says which tier sizes and codecs pay (no daemon needed)");
  plan->add_option("--trace", trace, "requests in the Mooncake format (docs/planner.md)")->required();
  plan->add_option("--model", model, "config.json of the model, or bytes of keys and values per token")->required();
  plan->add_option("--dram", plan_options.dram_bytes, "sizes of the DRAM tier to try, such as 64GiB 256GiB")
      ->required()
      ->transform(CLI::AsSizeValue(false));
  plan->add_option("--nvme", plan_options.nvme_bytes, "sizes of the NVMe tier to try")
      ->transform(CLI::AsSizeValue(false));
  plan->add_option("--remote", plan_options.remote_bytes, "sizes of the remote tier to try; 0: without limit")
      ->transform(CLI::AsSizeValue(false));
  plan->add_option("--codec", plan_options.codecs, "ladders, or codec chains of one, to try")->capture_default_str();
  plan->add_option("--max-error", plan_options.max_relative_error, "leaves out forms with a larger error")
      ->capture_default_str();
  plan->add_option("--error-price", plan_options.demotion.error_price,
                   "what an error of 1 costs, in hits (0: only hits count)")
      ->capture_default_str();
  plan->add_option("--policy", plan_options.policy, "eviction policy: lru, s3fifo, tinylfu or reuse")
      ->capture_default_str();
  plan->add_option("--prefill", plan_options.speeds.prefill_tokens_per_second, "prompt tokens computed a second")
      ->capture_default_str();
  plan->add_option("--dram-speed", plan_options.speeds.dram_bytes_per_second, "bytes a second")->capture_default_str();
  plan->add_option("--nvme-speed", plan_options.speeds.nvme_bytes_per_second, "bytes a second")->capture_default_str();
  plan->add_option("--remote-speed", plan_options.speeds.remote_bytes_per_second, "bytes a second")
      ->capture_default_str();
  plan->add_option("--chart", chart, "an SVG file to write");

  CLI11_PARSE(app, argc, argv);
  if (status->parsed()) return kvern::run_status(address, json, std::cout);
  if (top->parsed()) return kvern::run_top(address, top_options, std::cout);
  if (report->parsed()) return kvern::run_report(address, report_options, std::cout);
  if (explain->parsed()) return kvern::run_explain(address, hash, std::cout);
  if (inspect->parsed()) {
    return file.empty() ? kvern::run_inspect(address, namespace_hex, limit, std::cout)
                        : kvern::run_inspect_file(file, std::cout);
  }
  if (flush->parsed()) return kvern::run_flush(address, flush_options, std::cout);
  if (compact_show->parsed()) {
    return kvern::run_compact_show(address, compact_handle, compact_wait_seconds, std::cout);
  }
  if (compact_rm->parsed()) return kvern::run_compact_delete(address, compact_handle, std::cout);
  if (compact->parsed()) return kvern::run_compact_list(address, std::cout);
  if (keygen->parsed()) return kvern::run_keygen(directory, key_name, std::cout);
  if (doctor->parsed()) return kvern::run_doctor(address, std::cout);
  if (plan->parsed()) return kvern::run_plan(trace, model, plan_options, chart, std::cout);
  return kvern::run_bench(address, bench_options, std::cout);
}
