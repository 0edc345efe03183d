#include "store/stream_socket.h"

#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>

namespace kvern {
namespace {

std::string tls_error() {
  const unsigned long error = ::ERR_get_error();
  ::ERR_clear_error();
  const char* reason = error == 0 ? nullptr : ::ERR_reason_error_string(error);
  return reason == nullptr ? "the handshake was cut off" : reason;
}

std::string system_error(int error) { return std::generic_category().message(error); }

}  // namespace

Result<std::shared_ptr<TlsContext>> TlsContext::create(const std::string& ca_file, const std::string& certificate_file,
                                                       const std::string& key_file) {
  std::shared_ptr<TlsContext> context(new TlsContext(::SSL_CTX_new(::TLS_client_method())));
  if (context->get() == nullptr) return failure(Code::kInternal, "OpenSSL gives no context: " + tls_error());
  ::SSL_CTX_set_min_proto_version(context->get(), TLS1_2_VERSION);
  ::SSL_CTX_set_mode(context->get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  ::SSL_CTX_set_verify(context->get(), SSL_VERIFY_PEER, nullptr);
  const int trusted = ca_file.empty() ? ::SSL_CTX_set_default_verify_paths(context->get())
                                      : ::SSL_CTX_load_verify_locations(context->get(), ca_file.c_str(), nullptr);
  if (trusted != 1) return failure(Code::kInvalid, "cannot use the CA file '" + ca_file + "': " + tls_error());
  if (certificate_file.empty() != key_file.empty()) {
    return failure(Code::kInvalid, "a certificate file needs a key file, and the other way round");
  }
  if (!certificate_file.empty() &&
      (::SSL_CTX_use_certificate_chain_file(context->get(), certificate_file.c_str()) != 1 ||
       ::SSL_CTX_use_PrivateKey_file(context->get(), key_file.c_str(), SSL_FILETYPE_PEM) != 1)) {
    return failure(Code::kInvalid,
                   "cannot use the certificate '" + certificate_file + "' with its key: " + tls_error());
  }
  return context;
}

TlsContext::~TlsContext() { ::SSL_CTX_free(context_); }

Result<SocketAddress> resolve(const std::string& host, std::uint16_t port, bool numeric_only) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (numeric_only ? AI_NUMERICHOST : 0);
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0) return failure(Code::kUnavailable, "cannot resolve " + host + ": " + ::gai_strerror(error));
  SocketAddress address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  ::freeaddrinfo(found);
  return address;
}

StreamSocket::StreamSocket(StreamSocket&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      context_(std::move(other.context_)),
      tls_(std::exchange(other.tls_, nullptr)),
      connected_(other.connected_),
      wants_write_(other.wants_write_),
      must_send_again_(other.must_send_again_),
      wake_bytes_(other.wake_bytes_) {}

StreamSocket& StreamSocket::operator=(StreamSocket&& other) noexcept {
  StreamSocket old(std::move(*this));
  fd_ = std::exchange(other.fd_, -1);
  context_ = std::move(other.context_);
  tls_ = std::exchange(other.tls_, nullptr);
  connected_ = other.connected_;
  wants_write_ = other.wants_write_;
  must_send_again_ = other.must_send_again_;
  wake_bytes_ = other.wake_bytes_;
  return *this;
}

StreamSocket::~StreamSocket() {
  if (tls_ != nullptr) ::SSL_free(tls_);
  if (fd_ >= 0) ::close(fd_);
}

Result<StreamSocket> StreamSocket::connect(const SocketAddress& address, std::shared_ptr<TlsContext> tls,
                                           const std::string& host) {
  StreamSocket made;
  made.fd_ = ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (made.fd_ < 0) return failure(Code::kInternal, "no socket: " + system_error(errno));
  const int on = 1;  // many small requests go out in one piece anyway; the last one of a burst must not wait
  ::setsockopt(made.fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (::connect(made.fd_, reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 &&
      errno != EINPROGRESS) {
    return failure(Code::kUnavailable, system_error(errno));
  }
  made.wants_write_ = true;
  if (tls == nullptr) return made;
  made.context_ = std::move(tls);
  made.tls_ = ::SSL_new(made.context_->get());
  if (made.tls_ == nullptr || ::SSL_set_fd(made.tls_, made.fd_) != 1) return failure(Code::kInternal, tls_error());
  // A name is asked for and checked as a name, an address as an address.
  X509_VERIFY_PARAM* check = ::SSL_get0_param(made.tls_);
  if (::X509_VERIFY_PARAM_set1_ip_asc(check, host.c_str()) != 1) {
    ::ERR_clear_error();
    ::SSL_set_tlsext_host_name(made.tls_, host.c_str());
    if (::SSL_set1_host(made.tls_, host.c_str()) != 1) return failure(Code::kInternal, tls_error());
  }
  return made;
}

Result<bool> StreamSocket::finish_connect() {
  if (!connected_) {
    int error = 0;
    socklen_t length = sizeof error;
    ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return failure(Code::kUnavailable, system_error(error));
    connected_ = true;
    wants_write_ = false;
  }
  if (tls_ == nullptr) return true;
  const int result = ::SSL_connect(tls_);
  if (result == 1) {
    wants_write_ = false;
    return true;
  }
  if (const long verified = ::SSL_get_verify_result(tls_); verified != X509_V_OK) {
    ::ERR_clear_error();
    return failure(Code::kUnavailable, std::string("the server's certificate is not accepted: ") +
                                           ::X509_verify_cert_error_string(verified));
  }
  if (tls_moved(result).progress == Progress::kWouldBlock) return false;
  return failure(Code::kUnavailable, "no TLS connection: " + tls_error());
}

StreamSocket::Moved StreamSocket::tls_moved(int result) {
  wants_write_ = false;
  if (result > 0) return {Progress::kMoved, static_cast<std::size_t>(result)};
  switch (::SSL_get_error(tls_, result)) {
    case SSL_ERROR_WANT_READ:
      return {Progress::kWouldBlock};
    case SSL_ERROR_WANT_WRITE:
      wants_write_ = true;
      return {Progress::kWouldBlock};
    case SSL_ERROR_ZERO_RETURN:
      return {Progress::kClosed};
    default:
      return {Progress::kFailed};
  }
}

StreamSocket::Moved StreamSocket::send(std::span<iovec> parts) {
  if (tls_ != nullptr) {
    const auto bytes = std::min<std::size_t>(parts.front().iov_len, INT_MAX);
    const auto moved = tls_moved(::SSL_write(tls_, parts.front().iov_base, static_cast<int>(bytes)));
    must_send_again_ = moved.progress == Progress::kWouldBlock;
    return moved;
  }
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  const ssize_t sent = ::sendmsg(fd_, &message, MSG_NOSIGNAL);
  wants_write_ = false;
  if (sent >= 0) return {Progress::kMoved, static_cast<std::size_t>(sent)};
  if (errno == EAGAIN || errno == EINTR) {
    wants_write_ = true;
    return {Progress::kWouldBlock};
  }
  return {Progress::kFailed};
}

StreamSocket::Moved StreamSocket::receive(std::span<std::byte> room) {
  if (tls_ != nullptr) {
    return tls_moved(::SSL_read(tls_, room.data(), static_cast<int>(std::min<std::size_t>(room.size(), INT_MAX))));
  }
  const ssize_t received = ::recv(fd_, room.data(), room.size(), 0);
  if (received > 0) return {Progress::kMoved, static_cast<std::size_t>(received)};
  if (received == 0) return {Progress::kClosed};
  return {errno == EAGAIN || errno == EINTR ? Progress::kWouldBlock : Progress::kFailed};
}

void StreamSocket::wake_at(std::size_t bytes) {
  if (tls_ != nullptr || bytes == wake_bytes_) return;
  const int low = static_cast<int>(bytes);
  ::setsockopt(fd_, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low);
  wake_bytes_ = bytes;
}

}  // namespace kvern
