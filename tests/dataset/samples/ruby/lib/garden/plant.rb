module Garden
  class Plant
    attr_reader :name

    def initialize(name, days)
      @name = name
      @days = days
    end

    def ripe?(age)
      if age >= @days
        true
      else
        false
      end
    end
  end
end
