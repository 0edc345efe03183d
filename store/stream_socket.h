#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"

struct ssl_ctx_st;
struct ssl_st;

namespace kvern {

/// How TLS connections are checked. Shared by many sockets; immutable.
class TlsContext {
 public:
  /// ca_file: certificates that are trusted, in PEM; empty: the system's. certificate_file and key_file: what this side
  /// shows of itself; both empty: nothing. kInvalid when a file cannot be read or does not fit.
  static Result<std::shared_ptr<TlsContext>> create(const std::string& ca_file, const std::string& certificate_file,
                                                    const std::string& key_file);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;
  ssl_ctx_st* get() const { return context_; }

 private:
  explicit TlsContext(ssl_ctx_st* context) : context_(context) {}
  ssl_ctx_st* context_;
};

/// An address that a name was resolved to.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

/// May block for as long as the system's resolver takes, unless numeric_only. kUnavailable: the name is not known.
Result<SocketAddress> resolve(const std::string& host, std::uint16_t port, bool numeric_only);

/// A non-blocking TCP connection, with or without TLS. Not thread-safe. Its thread must have SIGPIPE blocked or
/// ignored.
class StreamSocket {
 public:
  enum class Progress { kMoved, kWouldBlock, kClosed, kFailed };
  struct Moved {
    Progress progress;
    std::size_t bytes = 0;
  };

  StreamSocket() = default;
  StreamSocket(StreamSocket&& other) noexcept;
  StreamSocket& operator=(StreamSocket&& other) noexcept;
  ~StreamSocket();

  /// Starts to connect. tls: null for none; host: whom the peer's certificate must name.
  static Result<StreamSocket> connect(const SocketAddress& address, std::shared_ptr<TlsContext> tls,
                                      const std::string& host);

  /// To be called when the descriptor is ready: true once bytes can be sent, false while more is to come.
  Result<bool> finish_connect();
  Moved send(std::span<iovec> parts);
  /// Whether the next send() must begin with what the last one began with: TLS has taken bytes of it that were not
  /// counted as moved.
  bool must_send_again() const { return must_send_again_; }
  Moved receive(std::span<std::byte> room);
  /// The descriptor need not become readable before so many bytes are there, or the connection ends. Only a hint, and
  /// none with TLS. The peer must be about to send that much.
  void wake_at(std::size_t bytes);
  int fd() const { return fd_; }
  /// Whether what would block waits for the descriptor to become writable.
  bool wants_write() const { return wants_write_; }

 private:
  Moved tls_moved(int result);

  int fd_ = -1;
  std::shared_ptr<TlsContext> context_;
  ssl_st* tls_ = nullptr;
  bool connected_ = false;
  bool wants_write_ = false;
  bool must_send_again_ = false;
  std::size_t wake_bytes_ = 1;
};

}  // namespace kvern
