#include "server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace vehicle {
namespace {

constexpr size_t kMostClients = 8, kLongestLine = 4096;
constexpr int kInherited = 3;  // SD_LISTEN_FDS_START

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

// False where the reader is gone, or did not read for a second.
bool write_line(int out, std::string line) {
  line += '\n';
  for (size_t done = 0; done < line.size();) {
    const ssize_t n = ::write(out, line.data() + done, line.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

std::string refusal(const char* why) {
  const Object callback = {
      {"functionName", ""}, {"status", "error"}, {"message", why}, {"mode", "silent"}, {"data", "[]"}};
  return dump(Array{callback});
}

}  // namespace

Server::~Server() {
  for (const auto& client : clients_)
    if (client.in != STDIN_FILENO) ::close(client.in);
  if (listener_ >= 0) ::close(listener_);
  if (!path_.empty()) ::unlink(path_.c_str());
}

void Server::add_standard_input() { clients_.push_back({STDIN_FILENO, STDOUT_FILENO}); }

void Server::listen_on(const std::string& path) {
  sockaddr_un address{};
  if (path.size() >= sizeof address.sun_path)
    throw std::runtime_error("the socket's path has more than 107 bytes: " + path);
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0 && S_ISSOCK(found.st_mode)) ::unlink(path.c_str());
  listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener_ < 0) fail("cannot make a socket");
  const mode_t before = ::umask(0117);
  const int bound = ::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address);
  ::umask(before);
  if (bound < 0) fail("cannot bind " + path);
  path_ = path;
  if (::listen(listener_, SOMAXCONN) < 0) fail("cannot listen on " + path);
}

void Server::listen_on_inherited() {
  const char *count = std::getenv("LISTEN_FDS"), *pid = std::getenv("LISTEN_PID");
  if (!count || !pid || std::atol(pid) != ::getpid()) throw std::runtime_error("systemd passed no socket");
  if (std::atoi(count) != 1) throw std::runtime_error("one socket was expected, systemd passed " + std::string(count));
  if (::fcntl(kInherited, F_SETFD, FD_CLOEXEC) < 0 || ::fcntl(kInherited, F_SETFL, O_NONBLOCK) < 0)
    fail("the passed socket");
  listener_ = kInherited;
}

void Server::run(int stop) {
  while (!wait(stop)) {
    for (auto& client : clients_) answer_one(client);
    drop_ended();
    if (clients_.empty() && listener_ < 0) return;
  }
  for (auto& client : clients_)
    while (answer_one(client)) {
    }
}

// Takes in what there is; true where it is time to stop.
bool Server::wait(int stop) {
  std::vector<pollfd> watched = {{stop, POLLIN, 0}, {clients_.size() < kMostClients ? listener_ : -1, POLLIN, 0}};
  bool ready = false;
  for (const auto& client : clients_) {
    const bool whole = client.read.find('\n') != std::string::npos;
    ready |= whole || client.ended;
    // who sends faster than is answered waits in the kernel's buffer
    watched.push_back({whole || client.ended ? -1 : client.in, POLLIN, 0});
  }
  if (::poll(watched.data(), watched.size(), ready ? 0 : -1) < 0 && errno != EINTR) fail("cannot wait for input");
  for (size_t i = 0; i < clients_.size(); ++i)
    if (watched[i + 2].revents) receive(clients_[i]);
  if (watched[1].revents) accept();
  return watched[0].revents != 0;
}

void Server::accept() {
  const int made = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (made < 0) return;  // it went away between the two calls
  const timeval second{1, 0};
  ::setsockopt(made, SOL_SOCKET, SO_SNDTIMEO, &second, sizeof second);
  clients_.push_back({made, made});
}

void Server::receive(Client& client) {
  char bytes[4096];
  const ssize_t n = ::read(client.in, bytes, sizeof bytes);
  if (n < 0 && errno == EINTR) return;
  if (n > 0) client.read.append(bytes, static_cast<size_t>(n));
  client.ended = n <= 0;
  // a last line without an end is a line
  if (client.ended && !client.read.empty() && client.read.back() != '\n') client.read += '\n';
  const size_t end = client.read.find('\n');
  if (std::min(end, client.read.size()) <= kLongestLine) return;
  write_line(client.out, refusal("A line has more than 4096 bytes."));
  client.read.clear(), client.ended = true;
}

bool Server::answer_one(Client& client) {
  const size_t end = client.read.find('\n');
  if (end == std::string::npos) return false;
  std::string line = client.read.substr(0, end);
  client.read.erase(0, end + 1);
  if (!line.empty() && line.back() == '\r') line.pop_back();
  const bool text = line.find('\0') == std::string::npos;
  const std::string said = text ? assistant_.answer(line, client.pending) : refusal("A line holds a zero byte.");
  if (!write_line(client.out, said)) client.read.clear(), client.ended = true;
  return true;
}

void Server::drop_ended() {
  const auto gone = [](const Client& client) {
    const bool over = client.ended && client.read.find('\n') == std::string::npos;
    if (over && client.in != STDIN_FILENO) ::close(client.in);
    return over;
  };
  clients_.erase(std::remove_if(clients_.begin(), clients_.end(), gone), clients_.end());
}

}  // namespace vehicle
