// Lines in, lines out: standard input, or clients of a Unix stream socket, one utterance a line, one line of JSON for
// each. It knows nothing of calls. One thread: the engine answers one utterance at a time, clients take turns.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "assistant.h"

namespace vehicle {

struct Client {
  int in, out;
  std::string read = {};
  bool ended = false;
  std::optional<Pending> pending = {};
};

class Server {
 public:
  explicit Server(Assistant& assistant) : assistant_(assistant) {}
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Each throws std::runtime_error with the reason where it cannot be done.
  void add_standard_input();
  void listen_on(const std::string& path);  // mode 0660; a socket that a former run left is replaced
  void listen_on_inherited();               // the one socket that systemd passes

  // Until `stop` is readable, or standard input ended where there is no listener. What was read by then is answered.
  void run(int stop);

 private:
  bool wait(int stop);
  void accept();
  void receive(Client& client);
  bool answer_one(Client& client);
  void drop_ended();

  Assistant& assistant_;
  int listener_ = -1;
  std::string path_;
  std::vector<Client> clients_;
};

}  // namespace vehicle
