// Browsers start no worker from a file. Where pages are opened as files, search runs in a hidden frame in its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const page = this.inside.document
      page.open()
      page.close() // some browsers would exchange an empty page for another one later
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...urls) => Promise.all(urls.map((each) => this.loaded(each)))
      this.loaded(url).then(() => {
        const told = this.waiting
        this.waiting = null
        told.forEach((data) => this.postMessage(data))
      })
    }

    loaded(url) {
      const script = this.inside.document.createElement("script")
      script.src = url
      const done = new Promise((resolve, reject) => Object.assign(script, { onload: resolve, onerror: reject }))
      this.inside.document.documentElement.append(script)
      return done
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
  }
}
