#include <cmath>
#include <fstream>
#include <iterator>
#include <ostream>
#include <vector>

#include "base/keys.h"
#include "kernels/container.h"
#include "kvernctl/commands.h"

namespace kvern {
namespace {

/// The bytes of a namespace id given in hexadecimal; empty text means all namespaces.
Result<std::string> namespace_bytes(const std::string& hex) {
  const auto bytes = from_hex(hex);
  if (!bytes || (bytes->size() != 16 && !bytes->empty())) {
    return failure(Code::kInvalid,
                   "a namespace is 32 hexadecimal digits (kvernctl status lists them), not '" + hex + "'");
  }
  return *bytes;
}

int fail(std::ostream& out, const Status& status) {
  out << status.to_string() << "\n";
  return 2;
}

double percent(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

int run_explain(const DaemonAddress& address, const std::string& block_hash_hex, std::ostream& out) {
  const auto hash = from_hex(block_hash_hex);
  if (!hash || hash->empty() || hash->size() > BlockHash::kMaxBytes) {
    return fail(out, Status(Code::kInvalid, "a block hash is an even number of up to 128 hexadecimal digits, not '" +
                                                block_hash_hex + "'"));
  }
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  wire::ControlRequest request;
  request.mutable_explain()->set_block_hash(*hash);
  wire::ControlReply reply;
  if (const Status status = session->call(request, &reply); !status) return fail(out, status);
  for (const auto& line : reply.explanation().lines()) out << line << "\n";
  return 0;
}

int run_inspect(const DaemonAddress& address, const std::string& namespace_hex, std::uint64_t limit,
                std::ostream& out) {
  const auto id = namespace_bytes(namespace_hex);
  if (!id) return fail(out, id.error());
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  wire::ControlRequest request;
  request.mutable_snapshot()->set_namespace_id(*id);
  request.mutable_snapshot()->set_limit(limit);
  wire::ControlReply reply;
  if (const Status status = session->call(request, &reply); !status) return fail(out, status);
  for (const auto& chunk : reply.snapshot().chunks()) {
    const auto& hashes = chunk.block_hashes();
    const std::size_t hash_bytes = chunk.hash_bytes();
    const std::string last =
        hash_bytes > 0 && hashes.size() >= hash_bytes ? hashes.substr(hashes.size() - hash_bytes) : "";
    out << to_hex({reinterpret_cast<const std::uint8_t*>(last.data()), last.size()}) << "  group " << chunk.group()
        << "  " << chunk.tokens() << " tokens  " << chunk.codec_spec() << "  " << chunk.encoded_bytes() << " bytes ("
        << std::lround(percent(chunk.encoded_bytes(), chunk.raw_bytes())) << " % of raw)  " << chunk.shards()
        << (chunk.shards() == 1 ? " shard" : " shards") << "\n";
  }
  out << reply.snapshot().chunks_size() << " chunks" << (reply.snapshot().truncated() ? " (more with --limit)" : "")
      << "\n";
  return 0;
}

int run_inspect_file(const std::string& path, std::ostream& out) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return fail(out, Status(Code::kNotFound, "cannot read " + path));
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto container = ContainerReader::parse(std::as_bytes(std::span(bytes)));
  if (!container) return fail(out, container.error());
  const auto& info = container->info();
  const auto& shape = info.shape;
  out << "key        " << info.key.to_string() << "\n"
      << "codec      " << info.codec_spec << " (" << info.lossy_generations << " lossy generations)\n"
      << "shape      layers " << shape.layer_begin << ".." << shape.layer_begin + shape.layers << " of "
      << info.group_layers << ", heads " << shape.head_begin << ".." << shape.head_begin + shape.heads << " of "
      << info.model_heads << ", " << shape.tokens << " tokens from position " << info.position << ", K "
      << shape.key_dim << ", V " << shape.value_dim << ", " << dtype_name(shape.dtype) << "\n"
      << "blocks     " << info.block_hashes.size() << " of " << info.block_tokens << " tokens\n"
      << "bytes      " << container->size_bytes() << " of " << shape.raw_bytes() << " raw, "
      << container->sections().size() << " sections\n";
  const Status verified = container->verify();
  out << "checksums  " << (verified ? "good" : verified.to_string()) << "\n";
  return verified ? 0 : 1;
}

int run_flush(const DaemonAddress& address, const FlushOptions& what, std::ostream& out) {
  const bool named = !what.namespace_hex.empty() || !what.tenant.empty() || !what.prefix_hex.empty();
  if (what.all == named) return fail(out, Status(Code::kInvalid, "name what to drop, or --all"));
  const auto id = namespace_bytes(what.namespace_hex);
  if (!id) return fail(out, id.error());
  const auto prefix = from_hex(what.prefix_hex);
  if (!prefix) {
    return fail(out, Status(Code::kInvalid, "a block hash is hexadecimal digits, not '" + what.prefix_hex + "'"));
  }
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  wire::ControlRequest request;
  request.mutable_flush()->set_namespace_id(*id);
  request.mutable_flush()->set_tenant(what.tenant);
  request.mutable_flush()->set_block_hash(*prefix);
  wire::ControlReply reply;
  if (const Status status = session->call(request, &reply); !status) return fail(out, status);
  const wire::Flushed& flushed = reply.flushed();
  out << "dropped " << flushed.chunks() << " chunks, " << flushed.bytes()
      << " bytes from DRAM, and what the lower tiers had\n";
  if (flushed.held() > 0) {
    out << flushed.held() << " of them are in use: nobody finds them any more, and their memory is free when the last "
        << "reader lets go\n";
  }
  return 0;
}

}  // namespace kvern
